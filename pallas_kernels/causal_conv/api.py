"""Depthwise causal convolution: argument checks, run numbers, dispatch and the one `custom_vjp`.

y_t = act(sum_j w_{W-1-j} x_{t-j}),  0 <= j < W, over the rows of t's own document

B batch   T tokens   W taps, the last one for the current token   C channels
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import dispatch
from pallas_kernels.causal_conv import context, reference, step, xla
from pallas_kernels.rows import run_numbers

__all__ = ["CausalConvParams", "causal_conv", "causal_conv_step"]


@dataclasses.dataclass(frozen=True)
class CausalConvParams:
    """Static facts of one call, handed to every implementation; also what `check` judges."""

    activation: str | None
    shape_x: tuple[int, ...]
    shape_w: tuple[int, ...]
    dtype: jnp.dtype


IMPLEMENTATIONS = {
    "reference": dispatch.Implementation(check=reference.check, apply=reference.apply),
    "xla": dispatch.Implementation(check=xla.check, forward=xla.forward, backward=xla.backward),
}
TABLE = {"default": ("xla",)}

STEPS = {
    "reference": dispatch.Implementation(check=reference.check, apply=reference.apply_step),
    "xla": dispatch.Implementation(check=step.check, apply=step.apply),
}
STEP_TABLE = {"default": ("xla",)}


def causal_conv(
    x: Float[Array, "B T C"],
    w: Float[Array, "W C"],
    *,
    activation: str | None = None,
    initial_state: Float[Array, "B W-1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | tuple[str, ...] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
    """Convolve every channel with its taps and return the last W - 1 inputs as the next state.

    `segment_ids` cut a row into documents wherever neighbours differ; `initial_state`, the inputs
    before the first token, belongs to the first document. Rows of the returned state that lie in
    an earlier document than the last token are 0. `activation` is None or "silu".

    `axis_name`: x and the ids are parts of rows whose tokens lie on the devices of that mesh axis,
    in order; both states are those of the whole rows, the same on all of them.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x: expected a non-empty (B, T, C), got {x.shape}")
    params = _params(x, w, activation)
    state_shape = (x.shape[0], w.shape[0] - 1, x.shape[2])
    if initial_state is None:
        initial_state = jnp.zeros(state_shape, x.dtype)
    _expect("initial_state", initial_state, state_shape, x.dtype)
    runs = None
    if segment_ids is not None:
        _expect("segment_ids", segment_ids, x.shape[:2], jnp.dtype(jnp.int32))
        runs = run_numbers(segment_ids)
    last = _last_inputs(x, initial_state, runs)
    if axis_name is not None:
        if x.shape[1] < w.shape[0] - 1:
            raise ValueError(
                f"x: expected at least W - 1 = {w.shape[0] - 1} tokens on each device of axis "
                f"{axis_name!r}, got {x.shape}"
            )
        initial_state = context.halo(axis_name, last, initial_state, segment_ids)
        last = context.of_last_part(axis_name, last)
    choice = dispatch.resolve("causal_conv", implementation, IMPLEMENTATIONS, TABLE, params)
    operands = (x, w, initial_state, runs)
    if all(IMPLEMENTATIONS[name].apply is None for name in choice.names):
        y = _causal_conv(choice, params, *operands)
    else:
        branches = {name: functools.partial(_one, name, params) for name in choice.names}
        y = dispatch.platform_switch(choice, branches, *operands)
    return y, last


def causal_conv_step(
    x: Float[Array, "B C"],
    w: Float[Array, "W C"],
    state: Float[Array, "B W-1 C"],
    *,
    activation: str | None = None,
    implementation: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, "B C"], Float[Array, "B W-1 C"]]:
    """Convolve one token per row; donate `state` to the jitted caller to update it in place."""
    if x.ndim != 2:
        raise ValueError(f"x: expected (B, C), got {x.shape}")
    params = _params(x, w, activation)
    _expect("state", state, (x.shape[0], w.shape[0] - 1, x.shape[1]), x.dtype)
    choice = dispatch.resolve("causal_conv_step", implementation, STEPS, STEP_TABLE, params)
    branches = {name: functools.partial(STEPS[name].apply, params) for name in choice.names}
    return dispatch.platform_switch(choice, branches, x, w, state)


def _last_inputs(x, initial_state, runs):
    """Every implementation shares this slice: there is nothing in it to make faster."""
    width = initial_state.shape[1]
    inputs = jnp.concatenate([initial_state, x], axis=1)[:, x.shape[1] :]
    if runs is None:
        return inputs
    before = jnp.broadcast_to(runs[:, :1], (x.shape[0], width))
    owner = jnp.concatenate([before, runs], axis=1)[:, x.shape[1] :]
    return jnp.where((owner == runs[:, -1:])[..., None], inputs, jnp.zeros_like(inputs))


def _one(name: str, params: CausalConvParams, *operands):
    implementation = IMPLEMENTATIONS[name]
    if implementation.apply is not None:
        return implementation.apply(params, *operands)
    return _causal_conv(dispatch.Choice(name), params, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _causal_conv(choice, params, x, w, initial_state, runs):
    branches = {n: functools.partial(IMPLEMENTATIONS[n].forward, params) for n in choice.names}
    return dispatch.platform_switch(choice, branches, x, w, initial_state, runs)


def _causal_conv_fwd(choice, params, *operands):
    # The operands are the only residuals: recomputing W products is cheaper than reading them.
    return _causal_conv(choice, params, *operands), operands


def _causal_conv_bwd(choice, params, operands, dy):
    branches = {n: functools.partial(IMPLEMENTATIONS[n].backward, params) for n in choice.names}
    dx, dw, dstate = dispatch.platform_switch(choice, branches, *operands, dy)
    runs = operands[3]
    druns = None if runs is None else np.zeros(runs.shape, jax.dtypes.float0)
    return dx, dw, dstate, druns


_causal_conv.defvjp(_causal_conv_fwd, _causal_conv_bwd)


def _params(x, w, activation) -> CausalConvParams:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if w.ndim != 2 or w.shape[0] < 1 or w.shape[1] != x.shape[-1] or w.dtype != x.dtype:
        raise ValueError(f"w: expected (W, {x.shape[-1]}) {x.dtype}, got {w.shape} {w.dtype}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation: expected None or 'silu', got {activation!r}")
    return CausalConvParams(activation, x.shape, w.shape, jnp.dtype(x.dtype))


def _expect(name: str, x, shape: tuple[int, ...], dtype) -> None:
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
        raise ValueError(f"{name}: expected {tuple(shape)} {dtype}, got {tuple(x.shape)} {x.dtype}")
