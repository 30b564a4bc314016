"""Depthwise causal convolution token by token, the definition; JAX differentiates the scan.

y_t = act(sum_j w_{W-1-j} x_{t-j})        the window is empty before a document's first token

B batch   T tokens   W taps, the last one for the current token   C channels
"""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import accumulator


def check(params) -> None:
    """Accept everything."""


def apply(params, x, w, initial_state, runs):
    """Return y [B,T,C]."""
    if runs is None:
        restart_BT = jnp.zeros(x.shape[:2], bool)
    else:
        restart_BT = jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, 0)))

    def token(state, inputs):
        x_BC, restart_B = inputs
        state = jnp.where(restart_B[:, None, None], jnp.zeros_like(state), state)
        y, state = apply_step(params, x_BC, w, state)
        return state, y

    _, y = jax.lax.scan(token, initial_state, (jnp.moveaxis(x, 1, 0), restart_BT.T))
    return jnp.moveaxis(y, 0, 1)


def apply_step(params, x, w, state):
    """Return (y [B,C], the last W - 1 inputs)."""
    acc = accumulator(x.dtype)
    window_BWC = jnp.concatenate([state, x[:, None]], axis=1)
    y = jnp.sum(window_BWC.astype(acc) * w.astype(acc), axis=1)
    y = jax.nn.silu(y) if params.activation == "silu" else y
    return y.astype(x.dtype), window_BWC[:, 1:]
