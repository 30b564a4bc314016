"""Softmax attention: argument checks, run numbers, dispatch and the one `custom_vjp`.

    o_t = sum_s softmax_s(scale q_t.k_s + mask_ts) v_s

A query at absolute position p = q_offset + t sees key s if s <= p (causal), p - s < window, and
both carry the same segment id. A query that sees nothing gives 0.

    B batch   T query tokens   S key tokens   N = K G query heads   K key and value heads
    H head dim
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pallas_kernels import dispatch, hopper
from pallas_kernels.attention import (
    context,
    cudnn,
    mosaic_gpu,
    pallas_tpu,
    pallas_tpu_step,
    reference,
    splash,
    step,
    xla,
)
from pallas_kernels.rows import run_numbers

__all__ = ["AttentionParams", "attention", "attention_step"]


@dataclasses.dataclass(frozen=True)
class AttentionParams:
    """Static facts of one call, handed to every implementation; also what `check` judges.

    `q_offset` is None when the offset is only known at run time; `paired` says that the ids of
    queries and keys were given apart, so that a query need not see itself; `ordered` says that ids
    are run numbers of the keys' row, so that a document is one range of keys.
    """

    scale: float
    causal: bool
    window: int | None
    q_offset: int | None
    segmented: bool
    paired: bool
    ordered: bool
    shape_q: tuple[int, ...]
    shape_k: tuple[int, ...]
    dtype: jnp.dtype


@dataclasses.dataclass(frozen=True)
class StepParams:
    """Static facts of one step."""

    scale: float
    shape_q: tuple[int, ...]
    shape_k: tuple[int, ...]
    dtype: jnp.dtype


IMPLEMENTATIONS = {
    "reference": dispatch.Implementation(check=reference.check, apply=reference.apply),
    "xla": dispatch.Implementation(check=xla.check, forward=xla.forward, backward=xla.backward),
    "cudnn": dispatch.Implementation(check=cudnn.check, apply=cudnn.apply, platforms=("cuda",)),
    "mosaic_gpu": dispatch.Implementation(
        check=mosaic_gpu.check,
        check_device=hopper.check_device,
        forward=mosaic_gpu.forward,
        backward=mosaic_gpu.backward,
        platforms=("cuda",),
    ),
    "pallas_tpu": dispatch.Implementation(
        check=pallas_tpu.check,
        check_device=pallas_tpu.check_device,
        forward=pallas_tpu.forward,
        backward=pallas_tpu.backward,
        platforms=("tpu",),
    ),
    "splash": dispatch.Implementation(
        check=splash.check,
        check_device=splash.check_device,
        apply=splash.apply,
        platforms=("tpu",),
    ),
}
TABLE = {
    "tpu": ("pallas_tpu", "splash", "xla"),
    "cuda": ("mosaic_gpu", "xla"),
    "default": ("xla",),
}

STEPS = {
    "reference": dispatch.Implementation(check=reference.check, apply=reference.apply_step),
    "xla": dispatch.Implementation(check=step.check, apply=step.apply),
    "pallas_tpu": dispatch.Implementation(
        check=pallas_tpu_step.check,
        check_device=pallas_tpu.check_device,
        apply=pallas_tpu_step.apply,
        platforms=("tpu",),
    ),
}
STEP_TABLE = {"tpu": ("pallas_tpu", "xla"), "default": ("xla",)}


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = True,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    window: int | None = None,
    scale: float | None = None,
    implementation: str | tuple[str, ...] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from q to k and v; query head n reads key head n // (N / K).

    One array of `segment_ids` cuts a packed row into documents wherever neighbours differ, so an id
    that comes back starts a new document; a pair (query ids, key ids) is compared as given.
    `q_offset` is the absolute position of the first query among the keys, for all rows or per row.
    `window` counts the keys seen, the query's own included. `scale` is H**-0.5 unless given.

    `axis_name`: the arrays are parts of rows whose tokens lie on the devices of that mesh axis, in
    order; `q_offset` is still that of the whole rows' first query.
    """
    _check_heads(q, k, v)
    run = functools.partial(
        _dispatched,
        causal=causal,
        window=window,
        scale=scale,
        implementation=implementation,
        ordered=not isinstance(segment_ids, tuple),
    )
    if axis_name is None:
        return run(q, k, v, segment_ids, q_offset)
    _segments(segment_ids, q, k)  # for its errors
    balance = causal and window is None
    return context.attend(axis_name, run, q, k, v, segment_ids, q_offset, balance=balance)


def _dispatched(q, k, v, segment_ids, q_offset, *, causal, window, scale, implementation, ordered):
    static_offset = int(q_offset) if isinstance(q_offset, int | np.integer) else None
    offset = None if static_offset is not None else _row_offsets(q_offset, q.shape[0])
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window: expected a positive int with causal=True, got {window}")
    q_ids, kv_ids = _segments(segment_ids, q, k)
    params = AttentionParams(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        window=window,
        q_offset=static_offset,
        segmented=q_ids is not None,
        paired=isinstance(segment_ids, tuple),
        ordered=ordered,
        shape_q=q.shape,
        shape_k=k.shape,
        dtype=jnp.dtype(q.dtype),
    )
    choice = dispatch.resolve("attention", implementation, IMPLEMENTATIONS, TABLE, params)
    operands = (q, k, v, q_ids, kv_ids, offset)
    if all(IMPLEMENTATIONS[name].apply is None for name in choice.names):
        return _attention(choice, params, *operands)
    branches = {name: functools.partial(_one, name, params) for name in choice.names}
    return dispatch.platform_switch(choice, branches, *operands)


def attention_step(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, "B"],
    *,
    scale: float | None = None,
    implementation: str | tuple[str, ...] | None = None,
) -> Float[Array, "B N H"]:
    """Attend from one token per row to the first `lengths` entries of its cache."""
    if q.ndim != 3:
        raise ValueError(f"q: expected (B, N, H), got {q.shape}")
    _check_heads(q[:, None], k_cache, v_cache)
    if lengths.shape != q.shape[:1] or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths: expected {q.shape[:1]} integers, got {lengths.shape} {lengths.dtype}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    params = StepParams(scale, q.shape, k_cache.shape, jnp.dtype(q.dtype))
    choice = dispatch.resolve("attention_step", implementation, STEPS, STEP_TABLE, params)
    branches = {name: functools.partial(_run_step, name, params) for name in choice.names}
    return dispatch.platform_switch(choice, branches, q, k_cache, v_cache, lengths)


# Jitted, so that the layers of one shape are traced and lowered once a program and not once each.
# What is lowered once has no scopes of its callers, hence the one inside.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_forward(name: str, params: AttentionParams, *operands):
    with jax.named_scope(f"attention={name}"):
        return IMPLEMENTATIONS[name].forward(params, *operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_backward(name: str, params: AttentionParams, *operands):
    with jax.named_scope(f"attention={name}"):
        return IMPLEMENTATIONS[name].backward(params, *operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_apply(name: str, params: AttentionParams, *operands):
    with jax.named_scope(f"attention={name}"):
        return IMPLEMENTATIONS[name].apply(params, *operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_step(name: str, params: StepParams, *operands):
    with jax.named_scope(f"attention_step={name}"):
        return STEPS[name].apply(params, *operands)


def _one(name: str, params: AttentionParams, *operands):
    if IMPLEMENTATIONS[name].apply is not None:
        return _run_apply(name, params, *operands)
    return _attention(dispatch.Choice(name), params, *operands)


def _forward(choice, params, *operands):
    branches = {name: functools.partial(_run_forward, name, params) for name in choice.names}
    return dispatch.platform_switch(choice, branches, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(choice, params, q, k, v, q_ids, kv_ids, offset):
    return _forward(choice, params, q, k, v, q_ids, kv_ids, offset)[0]


def _attention_fwd(choice, params, *operands):
    # Residual layout, the same for every implementation: the operands, o [B, T, N, H] in q's dtype
    # and the log of each row's softmax denominator [B, T, N] in fp32, +inf where nothing is seen.
    o, lse = _forward(choice, params, *operands)
    o = checkpoint_name(o, "attn_out")
    lse = checkpoint_name(lse, "attn_lse")
    return o, (*operands, o, lse)


def _attention_bwd(choice, params, residuals, do):
    branches = {name: functools.partial(_run_backward, name, params) for name in choice.names}
    dq, dk, dv = dispatch.platform_switch(choice, branches, *residuals, do)
    integers = [None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in residuals[3:6]]
    return dq, dk, dv, *integers


_attention.defvjp(_attention_fwd, _attention_bwd)


def _check_heads(q, k, v) -> None:
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q: expected a floating (B, T, N, H), got {q.shape} {q.dtype}")
    B, _, N, H = q.shape
    if k.ndim != 4 or k.shape[0] != B or k.shape[3] != H or k.dtype != q.dtype:
        raise ValueError(f"k: expected ({B}, S, K, {H}) {q.dtype}, got {k.shape} {k.dtype}")
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"v: expected {k.shape} {k.dtype} like k, got {v.shape} {v.dtype}")
    if k.shape[2] == 0 or N % k.shape[2]:
        raise ValueError(f"k: expected heads that divide the {N} of q, got {k.shape[2]}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q: expected no empty axis, got q {q.shape} and k {k.shape}")


def _row_offsets(q_offset, rows: int) -> Int[Array, "B"]:
    q_offset = jnp.asarray(q_offset)
    if q_offset.shape not in ((), (rows,)) or not jnp.issubdtype(q_offset.dtype, jnp.integer):
        raise ValueError(
            f"q_offset: expected an int, a scalar or ({rows},) integers, "
            f"got {q_offset.shape} {q_offset.dtype}"
        )
    return jnp.broadcast_to(q_offset.astype(jnp.int32), (rows,))


def _segments(segment_ids, q, k):
    if segment_ids is None:
        return None, None
    if isinstance(segment_ids, tuple):
        q_ids, kv_ids = segment_ids
        _check_ids("segment_ids[0]", q_ids, q.shape[:2])
        _check_ids("segment_ids[1]", kv_ids, k.shape[:2])
        return q_ids, kv_ids
    _check_ids("segment_ids", segment_ids, q.shape[:2])
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"segment_ids: expected a pair (query ids, key ids) for {q.shape[1]} queries and "
            f"{k.shape[1]} keys, got one array"
        )
    runs = run_numbers(segment_ids)
    return runs, runs


def _check_ids(name: str, ids, shape: tuple[int, ...]) -> None:
    if ids.shape != shape or ids.dtype != jnp.int32:
        raise ValueError(f"{name}: expected {shape} int32, got {ids.shape} {ids.dtype}")
