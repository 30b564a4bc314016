"""Depthwise causal convolution as W shifted products in one fusion, forward and backward.

u_t = sum_j w_{W-1-j} x_{t-j} [r_t = r_{t-j}]          y = act(u)          r the document number
dx_t = sum_j w_{W-1-j} du_{t+j} [r_t = r_{t+j}]        dw_{W-1-j} = sum_t x_{t-j} du_t [..]

B batch   T tokens   W taps, the last one for the current token   C channels
"""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import accumulator


def check(params) -> None:
    """Accept everything."""


def forward(params, x, w, initial_state, runs):
    """Return y [B,T,C]; sums are fp32."""
    y = _activate(params, _taps(x, w, initial_state, runs)).astype(x.dtype)
    # Without the barrier XLA leaves the rounding out and hands y on in fp32: twice the traffic.
    return jax.lax.optimization_barrier(y)


def backward(params, x, w, initial_state, runs, dy):
    """Return the gradients of x, w and the initial state."""
    acc, (W, _), T = accumulator(x.dtype), w.shape, x.shape[1]
    du = dy.astype(acc)
    if params.activation is not None:
        u = _taps(x, w, initial_state, runs)
        (du,) = jax.vjp(lambda u: _activate(params, u), u)[1](du)
    early = min(T, W - 1)  # tokens that the initial state reaches
    dx, dstate, dw = jnp.zeros(x.shape, acc), jnp.zeros(initial_state.shape, acc), []
    for tap, lag in enumerate(range(W - 1, -1, -1)):
        counted = _same_document(du, runs, lag)
        weighted = w[tap].astype(acc) * counted
        dx += jnp.pad(weighted, ((0, 0), (0, lag), (0, 0)))[:, lag:]
        dstate += jnp.pad(weighted[:, :early], ((0, 0), (tap, W - 1), (0, 0)))[:, : W - 1]
        dw.append(jnp.sum(_before(x, initial_state, lag).astype(acc) * counted, (0, 1)))
    return dx.astype(x.dtype), jnp.stack(dw).astype(w.dtype), dstate.astype(x.dtype)


def _taps(x, w, initial_state, runs):
    acc, (W, _) = accumulator(x.dtype), w.shape
    u = jnp.zeros(x.shape, acc)
    for tap, lag in enumerate(range(W - 1, -1, -1)):
        inputs = _before(x, initial_state, lag).astype(acc)
        u += w[tap].astype(acc) * _same_document(inputs, runs, lag)
    return u


def _before(x, initial_state, lag: int):
    """The inputs `lag` tokens before each. Joined for every lag anew, which is part of the fusion:
    a joined array of all inputs would be written and read."""
    first, T = initial_state.shape[1] - lag, x.shape[1]
    return jnp.concatenate([initial_state[:, first : first + T], x[:, : max(T - lag, 0)]], 1)


def _same_document(value_BTC, runs, lag: int):
    """Zero the tokens whose predecessor at distance `lag` lies in another document."""
    if runs is None or lag == 0:
        return value_BTC
    # Before the first token lies the initial state, which belongs to the first document.
    before = jnp.pad(runs, ((0, 0), (lag, 0)), mode="edge")[:, : runs.shape[1]]
    return jnp.where((runs == before)[..., None], value_BTC, jnp.zeros_like(value_BTC))


def _activate(params, u):
    return jax.nn.silu(u) if params.activation == "silu" else u
