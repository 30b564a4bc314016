"""The gated delta rule as plain XLA: segments of a sequence, one after another.

What `xla_chunks.py` computes for all chunks of a segment at once takes memory for one of them, not
for the sequence. The state goes from each to the next, its gradient the other way.

    B batch   T tokens   Z chunks   C rows of a chunk   R value heads   H key dim   E value dim
    N segments of L chunks
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import xla_chunks
from pallas_kernels.precision import accumulator

# Of one [C,C] array of all chunks of a segment; some twenty times that is alive. With a quarter of
# it an H100 takes longer at 8 rows of 4096 tokens, which then are four segments instead of one.
SEGMENT_BYTES = 1 << 27


def check(params) -> None:
    """Accept everything."""


def forward(params, q, k, v, g, beta, runs, initial_state):
    """Return (o, last state, inverses [Z,B,R,C,C], states at the chunk starts [Z,B,R,H,E])."""
    N, _, operands = _segments(params, q, k, v, g, beta, runs)

    def segment(state, n):
        o, state, *residuals = xla_chunks.forward(
            params, *(_tokens_of(x, n, N) for x in operands), state
        )
        return state, (o, *(residuals if params.residuals else ()))

    state, (o, *residuals) = _scan(segment, initial_state, N)
    t_inv, states = (_whole(x, q, params) for x in residuals) if residuals else (None, None)
    return _tokens(o, q), state, t_inv, states


def backward(params, q, k, v, g, beta, runs, initial_state, t_inv, states, do, dstate):
    """Return the gradients of q, k, v, g, beta and the initial state."""
    del initial_state  # it is states[0]
    N, L, operands = _segments(params, q, k, v, g, beta, runs)
    chunked = [_fill(x, N * L, 0) for x in (t_inv, states)]
    do = _fill(do, N * L * params.config.chunk, 1)

    def segment(dstate, n):
        of_chunks = (jax.lax.dynamic_slice_in_dim(x, n * L, L) for x in chunked)
        of_tokens = (_tokens_of(x, n, N) for x in operands)
        *grads, dstate = xla_chunks.backward(
            params, *of_tokens, *of_chunks, _tokens_of(do, n, N), dstate
        )
        return dstate, grads

    dstate, grads = _scan(segment, dstate, N, reverse=True)
    return *(_tokens(x, q) for x in grads), dstate


def segment_chunks(params) -> int:
    """Chunks of a segment: as many as `SEGMENT_BYTES` holds, all segments about the same."""
    C, (B, T, R, _) = params.config.chunk, params.shape_v
    Z, size = -(-T // C), jnp.dtype(accumulator(params.dtype)).itemsize
    most = max(1, SEGMENT_BYTES // (B * R * C * C * size))
    return -(-Z // -(-Z // most))


def _segments(params, q, k, v, g, beta, runs):
    """N, L and the operands filled up to N L chunks, with what comes before each token's run.

    Rows added have beta = 0 and g = 0, which leave the state untouched, and they continue the last
    document, so that they do not end it either.
    """
    C, L = params.config.chunk, segment_chunks(params)
    N = -(-q.shape[1] // (L * C))
    operands = [_fill(x, N * L * C, 1) for x in (q, k, v, g, beta)]
    if runs is None:
        return N, L, (*operands, None, None)
    runs = _fill(runs, N * L * C, 1, "edge")
    # The first document owns the initial state.
    return N, L, (*operands, runs, jnp.concatenate([runs[:, :1], runs[:, :-1]], 1))


def _fill(x, size, axis, mode="constant"):
    missing = size - x.shape[axis]
    pads = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, pads, mode=mode) if missing else x


def _tokens_of(x, n, N):
    """The n-th of N parts of [B,T,...]."""
    if x is None or N == 1:
        return x
    size = x.shape[1] // N
    return jax.lax.dynamic_slice_in_dim(x, n * size, size, 1)


def _scan(segment, state, N, reverse=False):
    """Walk over the segments; results [N,...]."""
    if N == 1:
        state, results = segment(state, 0)
        return state, jax.tree.map(lambda x: x[None], results)
    return jax.lax.scan(segment, state, jnp.arange(N), reverse=reverse)


def _tokens(x, like):
    """[N,B,T/N,...] -> [B,T,...], as many tokens as `like` has."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : like.shape[1]]


def _whole(x, q, params):
    """[N,L,...] -> [Z,...]"""
    chunks = -(-q.shape[1] // params.config.chunk)
    return x.reshape(-1, *x.shape[2:])[:chunks]
