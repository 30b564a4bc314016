"""Whole chunks, and the gate rows that kernels for GPUs, `triton_gpu` too, read beside q, k and v.

With c the cumulative g of a chunk, r_i the document of row i, p that of the token before the chunk:

    a_i = exp(c_i) [r_i = p]      z_i = exp(c_C - c_i) [r_i = r_C]      y = exp(c_C) [r_C = p]

    B batch   T tokens   R value heads   Z chunks   C rows of a chunk
"""

import jax.numpy as jnp

# The rows of `gate_rows`.
CUMULATIVE, READ, WRITE, BETA, RUN, KEEP = range(6)


def gate_rows(C, g, beta, runs):
    """Stack c, a, z, beta, the run numbers and y to [Z,B,R,6,C] fp32 from [B,T,R] and [B,T]."""
    g, beta = (_chunk_rows(x, C) for x in (g, beta))
    c = jnp.cumsum(g, -1)
    end = c[..., -1:]
    a, z, y = c, end - c, jnp.broadcast_to(end, c.shape)
    run = jnp.zeros_like(c)
    if runs is not None:
        run = _chunk_rows(runs[..., None].astype(c.dtype), C, "edge")
        last = run[..., -1:]
        before = jnp.concatenate([run[:1, ..., :1], last[:-1]])
        # Exponents are masked, not the exponentials; exact as in xla_chunks.py.
        a = jnp.where(run == before, a, -jnp.inf)
        z = jnp.where(run == last, z, -jnp.inf)
        y = jnp.where(last == before, y, -jnp.inf)
        run = jnp.broadcast_to(run, c.shape)
    return jnp.stack([c, jnp.exp(a), jnp.exp(z), beta, run, jnp.exp(y)], 3)


def whole_chunks(x, C, mode="constant"):
    """Fill [B,T,...] up to a multiple of C rows."""
    rows = -x.shape[1] % C
    return jnp.pad(x, ((0, 0), (0, rows), *((0, 0),) * (x.ndim - 2)), mode=mode) if rows else x


def _chunk_rows(x, C, mode="constant"):
    """[B,T,R] -> [Z,B,R,C]; added rows have g = 0 and beta = 0 and continue the last document."""
    x = whole_chunks(x, C, mode)
    return x.reshape(x.shape[0], -1, C, x.shape[2]).transpose(1, 0, 3, 2)
