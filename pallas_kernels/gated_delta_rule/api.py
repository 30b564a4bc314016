"""The gated delta rule: argument checks, run numbers, dispatch and the one `custom_vjp`.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale S_t^T q_t

(Gated Delta Networks, arXiv:2412.06464.) Normalisation, gates and convolution belong to the caller.

    B batch   T tokens   K key heads   R value heads, R % K == 0   H key dim   E value dim
    Z chunks  C chunk length
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
from pallas_kernels.gated_delta_rule import (
    context,
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_step,
    pallas_tpu,
    pallas_tpu_step,
    reference,
    step,
    triton_gpu,
    triton_gpu_backward,
    triton_gpu_step,
    xla,
)
from pallas_kernels.precision import accumulator
from pallas_kernels.rows import run_numbers

__all__ = ["GatedDeltaConfig", "GatedDeltaParams", "gated_delta_rule", "gated_delta_step"]


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig:
    """How the sequence is cut; results do not depend on it beyond rounding.

    chunk: rows of a chunk; None is 128 where the mesh in use is of TPUs, else 64.
    segments: parts of a sequence that run at the same time in the forward and in the backward of
        `mosaic_gpu`; None is what was tuned for the device, or a model's choice.
    """

    chunk: int | None = None
    segments: tuple[int, int] | None = None

    def __post_init__(self):
        if self.chunk is not None and (self.chunk < 1 or self.chunk & (self.chunk - 1)):
            raise ValueError(f"config.chunk: expected a power of two, got {self.chunk}")
        if self.segments is not None and not _is_pair(self.segments):
            raise ValueError(
                f"config.segments: expected a tuple of two numbers from 1, got {self.segments}"
            )


def _is_pair(value: object) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and all(type(n) is int and n >= 1 for n in value)


@dataclasses.dataclass(frozen=True)
class GatedDeltaParams:
    """Static facts of one call, handed to every implementation; also what `check` judges.

    The chunk of `config` is a number here, the same for every implementation of one call.
    Without `residuals` what `forward` returns beyond the outputs is dropped, whatever it is.
    """

    scale: float
    config: GatedDeltaConfig
    shape_q: tuple[int, ...]
    shape_v: tuple[int, ...]
    dtype: jnp.dtype
    residuals: bool = False


IMPLEMENTATIONS = {
    "mosaic_gpu": dispatch.Implementation(
        check=mosaic_gpu.check,
        check_device=hopper.check_device,
        forward=mosaic_gpu.forward,
        backward=mosaic_gpu_backward.backward,
        platforms=("cuda",),
    ),
    "pallas_tpu": dispatch.Implementation(
        check=pallas_tpu.check,
        check_device=pallas_tpu.check_device,
        forward=pallas_tpu.forward,
        backward=pallas_tpu.backward,
        platforms=("tpu",),
    ),
    "reference": dispatch.Implementation(check=reference.check, apply=reference.apply),
    "triton_gpu": dispatch.Implementation(
        check=triton_gpu.check,
        check_device=triton_gpu.check_device,
        forward=triton_gpu.forward,
        backward=triton_gpu_backward.backward,
        platforms=("cuda",),
    ),
    "xla": dispatch.Implementation(check=xla.check, forward=xla.forward, backward=xla.backward),
}
TABLE = {
    "cuda": ("mosaic_gpu", "triton_gpu", "xla"),
    "tpu": ("pallas_tpu", "xla"),
    "default": ("xla",),
}

STEPS = {
    "mosaic_gpu": dispatch.Implementation(
        check=mosaic_gpu_step.check,
        check_device=hopper.check_device,
        apply=mosaic_gpu_step.apply,
        platforms=("cuda",),
    ),
    "pallas_tpu": dispatch.Implementation(
        check=pallas_tpu_step.check,
        check_device=pallas_tpu_step.check_device,
        apply=pallas_tpu_step.apply,
        platforms=("tpu",),
    ),
    "reference": dispatch.Implementation(check=reference.check, apply=reference.apply_step),
    "triton_gpu": dispatch.Implementation(
        check=triton_gpu_step.check,
        check_device=triton_gpu.check_device,
        apply=triton_gpu_step.apply,
        platforms=("cuda",),
    ),
    "xla": dispatch.Implementation(check=step.check, apply=step.apply),
}
STEP_TABLE = {
    "cuda": ("mosaic_gpu", "triton_gpu", "xla"),
    "tpu": ("pallas_tpu", "xla"),
    "default": ("xla",),
}


def gated_delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T R E"],
    g: Float[Array, "B T R"],
    beta: Float[Array, "B T R"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B R H E"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    config: GatedDeltaConfig | None = None,
    implementation: str | tuple[str, ...] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T R E"], Float[Array, "B R H E"]]:
    """Run the gated delta rule over whole sequences and return the outputs and the last state.

    g is the log decay, at most 0; it, beta and the states are fp32 (float64 beside float64 q).
    A token with beta = 0 and g = 0 leaves the state untouched: pad with those. `segment_ids` cut a
    row into documents wherever neighbours differ, so an id that comes back starts a new document;
    `initial_state` belongs to the first one. `scale` is H**-0.5 unless given.

    `mosaic_gpu` counts on beta |k|^2 <= 2, as keys of unit length have it, where it cuts a sequence
    into segments: else a state may grow from token to token, and what it leaves out as decayed
    might matter.

    `axis_name`: the arrays are parts of rows whose tokens lie on the devices of that mesh axis, in
    order; both states are those of the whole rows, the same on all of them.
    """
    batch, dim = _check_sequence(q, k, v, g, beta)
    params = _params(q, v, scale, config)
    state_shape = (*batch[:1], v.shape[-2], dim, v.shape[-1])
    acc = accumulator(q.dtype)
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, acc)
    _expect("initial_state", initial_state, state_shape, acc)
    runs = None
    if segment_ids is not None:
        _expect("segment_ids", segment_ids, batch, jnp.dtype(jnp.int32))
        runs = run_numbers(segment_ids)
    if axis_name is not None:
        part = functools.partial(
            gated_delta_rule, scale=scale, config=config, implementation=implementation
        )
        arrays = q, k, v, g, beta
        return context.over_parts(part, axis_name, arrays, segment_ids, initial_state)
    choice = dispatch.resolve("gated_delta_rule", implementation, IMPLEMENTATIONS, TABLE, params)
    operands = (q, k, v, g, beta, runs, initial_state)
    if all(IMPLEMENTATIONS[name].apply is None for name in choice.names):
        o, state = _gated_delta_rule(choice, params, *operands)
    else:
        branches = {name: functools.partial(_one, name, params) for name in choice.names}
        o, state = dispatch.platform_switch(choice, branches, *operands)
    return checkpoint_name(o, "gdn_out"), state


def gated_delta_step(
    q: Float[Array, "B K H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B R E"],
    g: Float[Array, "B R"],
    beta: Float[Array, "B R"],
    state: Float[Array, "B R H E"],
    *,
    scale: float | None = None,
    implementation: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, "B R E"], Float[Array, "B R H E"]]:
    """Advance the state by one token; donate `state` to the jitted caller to update it in place."""
    batch, dim = _check_sequence(q, k, v, g, beta)
    state_shape = (*batch[:1], v.shape[-2], dim, v.shape[-1])
    _expect("state", state, state_shape, accumulator(q.dtype))
    params = _params(q, v, scale, None)
    choice = dispatch.resolve("gated_delta_step", implementation, STEPS, STEP_TABLE, params)
    branches = {name: functools.partial(STEPS[name].apply, params) for name in choice.names}
    return dispatch.platform_switch(choice, branches, q, k, v, g, beta, state)


def _one(name: str, params: GatedDeltaParams, *operands):
    implementation = IMPLEMENTATIONS[name]
    if implementation.apply is not None:
        return implementation.apply(params, *operands)
    return _gated_delta_rule(dispatch.Choice(name), params, *operands)


# Jitted, so that the layers of one shape are traced and lowered once a program and not once each.
# What is lowered once has no scopes of its callers, hence the one inside.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_forward(name: str, params: GatedDeltaParams, *operands):
    with jax.named_scope(f"gated_delta_rule={name}"):
        outputs = IMPLEMENTATIONS[name].forward(params, *operands)
    return outputs if params.residuals else outputs[:2]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_backward(name: str, params: GatedDeltaParams, *operands):
    with jax.named_scope(f"gated_delta_rule={name}"):
        return IMPLEMENTATIONS[name].backward(params, *operands)


def _forward(choice, params, *operands):
    branches = {name: functools.partial(_run_forward, name, params) for name in choice.names}
    return dispatch.platform_switch(choice, branches, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated_delta_rule(choice, params, q, k, v, g, beta, runs, initial_state):
    return _forward(choice, params, q, k, v, g, beta, runs, initial_state)


def _gated_delta_rule_fwd(choice, params, *operands):
    # Residual layout, the same for every implementation: the operands, an inverse [Z, B, R, C, C]
    # and the state at the start of each chunk [Z, B, R, H, E], both in q's dtype. The inverse is
    # (I + A)^-1; only the backward of the same implementation reads it, and `pallas_tpu` has beta
    # on the other side of it.
    params = dataclasses.replace(params, residuals=True)
    o, state, t_inv, states = _forward(choice, params, *operands)
    t_inv = checkpoint_name(t_inv, "gdn_t_inv")
    states = checkpoint_name(states, "gdn_states")
    return (o, state), (*operands, t_inv, states)


def _gated_delta_rule_bwd(choice, params, residuals, cotangents):
    branches = {name: functools.partial(_run_backward, name, params) for name in choice.names}
    *arrays, dstate = dispatch.platform_switch(choice, branches, *residuals, *cotangents)
    runs = residuals[5]
    druns = None if runs is None else np.zeros(runs.shape, jax.dtypes.float0)
    return *arrays, druns, dstate


_gated_delta_rule.defvjp(_gated_delta_rule_fwd, _gated_delta_rule_bwd)


def _params(q, v, scale, config) -> GatedDeltaParams:
    config = config or GatedDeltaConfig()
    if config.chunk is None:
        on_tpu = (dispatch.device_kind() or "").startswith("TPU")
        config = dataclasses.replace(config, chunk=128 if on_tpu else 64)
    return GatedDeltaParams(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        config=config,
        shape_q=q.shape,
        shape_v=v.shape,
        dtype=jnp.dtype(q.dtype),
    )


def _check_sequence(q, k, v, g, beta) -> tuple[tuple[int, ...], int]:
    """Check all but the state; return the leading axes, (B, T) or (B,), and the key dim."""
    if q.ndim != g.ndim + 1 or g.ndim not in (2, 3):
        raise ValueError(f"q: expected one axis more than g, got {q.shape} and g {g.shape}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    *lead, heads, dim = q.shape
    lead = tuple(lead)
    _expect("k", k, q.shape, q.dtype)
    if v.ndim != q.ndim or v.shape[:-2] != lead or v.dtype != q.dtype:
        raise ValueError(
            f"v: expected {(*lead, 'R', 'E')} {q.dtype} beside q {q.shape}, got {v.shape} {v.dtype}"
        )
    if v.shape[-2] % heads:
        raise ValueError(f"v: expected a multiple of q's {heads} heads, got {v.shape[-2]} heads")
    for name, x in (("g", g), ("beta", beta)):
        _expect(name, x, (*lead, v.shape[-2]), accumulator(q.dtype))
    if 0 in lead:
        raise ValueError(f"q: expected at least one row and one token, got {q.shape}")
    return lead, dim


def _expect(name: str, x, shape: tuple[int, ...], dtype) -> None:
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
        raise ValueError(f"{name}: expected {tuple(shape)} {dtype}, got {tuple(x.shape)} {x.dtype}")
