"""The gated delta rule in chunks of C tokens, forward and backward, as plain XLA.

Per head and chunk, c = cumulative g inside the chunk, S = state at its start:

    D_ij = exp(c_i - c_j) for i >= j else 0    a_i = exp(c_i)   z_i = exp(c_C - c_i)    y = exp(c_C)
    A  = tril(beta_i K K^T * D, -1)    X  = (I + A)^-1           P  = scale tril(Q K^T * D)
    R  = V - a K S                     V' = X (beta R)           O  = scale a Q S + P V'
    S+ = y S + (z K)^T V'

The recurrent scans hold only what the state depends on; everything else is batched over all the
chunks before or after. The backward is derived in the README. Matmul operands have the input
dtype; gates, the inverse, states and all sums are fp32 (float64 for float64 inputs).

    B batch   T tokens, whole chunks   Z chunks   C rows of a chunk (d, f its columns)   K key heads
    G value heads per key head   R = K G   H key dim   E value dim
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.gated_delta_rule.xla_inverse import unit_lower_inverse
from pallas_kernels.precision import accumulator, dot

# Chunks in one turn of the scans' loop: launches and slices of a turn are fused and overlap.
UNROLL = 4


class Chunks(NamedTuple):
    """One sequence cut into chunks; the chunk axis leads because the scans walk over it."""

    q: Array  # [Z,B,K,C,H]
    k: Array  # [Z,B,K,C,H]
    v: Array  # [Z,B,K,G,C,E]
    beta: Array  # [Z,B,K,G,C,1]
    decay: Array  # [Z,B,K,G,C,C]   D, lower triangle with the diagonal
    a: Array  # [Z,B,K,G,C,1]
    z: Array  # [Z,B,K,G,C,1]
    y: Array  # [Z,B,K,G,1,1]


def forward(params, q, k, v, g, beta, runs, before, initial_state):
    """Return (o, last state, inverses [Z,B,R,C,C], states at the chunk starts [Z,B,R,H,E]).

    `before` [B,T] are the runs of the tokens before these.
    """
    x = _chunks(params, q, k, v, g, beta, runs, before)
    dtype = q.dtype
    t_inv = unit_lower_inverse(_pairs(x)).astype(dtype)

    def chunk(state, x):
        k, v, beta, a, z, y, t_inv = x
        s = state.astype(dtype)
        r = beta * (v.astype(state.dtype) - a * dot("bkch,bkghe->bkgce", k, s))
        v_new = dot("bkgcd,bkgde->bkgce", t_inv, r.astype(dtype))
        added = dot("bkch,bkgce->bkghe", k, (z * v_new).astype(dtype))
        return y * state + added, (s, v_new.astype(dtype))

    state, (states, v_new) = jax.lax.scan(
        chunk,
        _grouped(initial_state, x),
        (x.k, x.v, x.beta, x.a, x.z, x.y, t_inv),
        unroll=UNROLL,
    )
    p = params.scale * _scores(x)
    o = params.scale * x.a * dot("zbkch,zbkghe->zbkgce", x.q, states)
    o = o + dot("zbkgcd,zbkgde->zbkgce", p.astype(dtype), v_new)
    return (
        _join(o).astype(dtype),
        state.reshape(initial_state.shape),
        _ungrouped(t_inv),
        _ungrouped(states),
    )


def backward(params, q, k, v, g, beta, runs, before, t_inv, states, do, dstate):
    """Return the gradients of q, k, v, g, beta and the state before the first chunk."""
    x = _chunks(params, q, k, v, g, beta, runs, before)
    dtype, acc = q.dtype, accumulator(q.dtype)
    t_inv, states = _regrouped(t_inv, x), _regrouped(states, x)
    do = _cut_values(do, x)
    p = params.scale * _scores(x)
    p_do = dot("zbkgdc,zbkgde->zbkgce", p.astype(dtype), do)
    q_do = dot("zbkch,zbkgce->zbkghe", x.q, (params.scale * x.a * do.astype(acc)).astype(dtype))

    def chunk(dstate, x):
        k, beta, a, z, y, t_inv, p_do, q_do = x
        ds = dstate.astype(dtype)
        dv_new = p_do + z * dot("bkch,bkghe->bkgce", k, ds)
        dr = dot("bkgdc,bkgde->bkgce", t_inv, dv_new.astype(dtype))
        removed = dot("bkch,bkgce->bkghe", k, (a * beta * dr).astype(dtype))
        return y * dstate + q_do - removed, (ds, dr)

    dstate, (dstates, dr) = jax.lax.scan(
        chunk,
        _grouped(dstate, x),
        (x.k, x.beta, x.a, x.z, x.y, t_inv, p_do, q_do),
        reverse=True,
        unroll=UNROLL,
    )
    dq, dk, dg, dbeta = _gradients(params, x, t_inv, states, p, do, dstates, dr)
    dv = x.beta * dr
    return (
        _join_keys(dq).astype(dtype),
        _join_keys(dk).astype(dtype),
        _join(dv).astype(dtype),
        _join(dg)[..., 0],
        _join(dbeta)[..., 0],
        _ungrouped(dstate[None])[0],
    )


def _gradients(params, x: Chunks, t_inv, states, p, do, dstates, dr):
    """Gradients that no other chunk waits for, batched over all chunks."""
    dtype, acc = x.q.dtype, accumulator(x.q.dtype)
    r = x.v.astype(acc) - x.a * dot("zbkch,zbkghe->zbkgce", x.k, states)
    v_new = dot("zbkgcd,zbkgde->zbkgce", t_inv, (x.beta * r).astype(dtype)).astype(dtype)
    lower = _triangle(x.q.shape[-2])
    dp = jnp.where(lower, dot("zbkgce,zbkgde->zbkgcd", do, v_new), 0)
    strict = _triangle(x.q.shape[-2], -1)
    da = jnp.where(strict, -dot("zbkgce,zbkgde->zbkgcd", dr.astype(dtype), v_new), 0)
    pairs = _key_products(x)  # B, so that A = beta B and no division by beta is needed
    e = dp * p + da * x.beta * pairs

    # One key head serves G value heads: their parts are summed before the product, not after it.
    dqk = jnp.sum(params.scale * dp * x.decay, 3).astype(dtype)
    dkk = jnp.sum(x.beta * da * x.decay, 3)
    dkk = (dkk + jnp.swapaxes(dkk, -1, -2)).astype(dtype)
    dq_state = params.scale * x.a * dot("zbkgce,zbkghe->zbkgch", do, states)
    dk_write = x.z * dot("zbkgce,zbkghe->zbkgch", v_new, dstates)
    dk_read = -x.a * dot("zbkgce,zbkghe->zbkgch", (x.beta * dr).astype(dtype), states)
    dq = jnp.sum(dq_state, 3) + dot("zbkcd,zbkdh->zbkch", dqk, x.k)
    dk = dot("zbkdc,zbkdh->zbkch", dqk, x.q) + dot("zbkcd,zbkdh->zbkch", dkk, x.k)
    dk = dk + jnp.sum(dk_write + dk_read, 3)

    dbeta = jnp.sum(dr * r, -1, keepdims=True) + jnp.sum(da * pairs, -1, keepdims=True)
    q_acc, k_acc = x.q.astype(acc)[:, :, :, None], x.k.astype(acc)[:, :, :, None]
    written = jnp.sum(k_acc * dk_write, -1, keepdims=True)
    dc = jnp.sum(e, -1, keepdims=True) - jnp.sum(e, -2)[..., None] - written
    dc = dc + jnp.sum(q_acc * dq_state + k_acc * dk_read, -1, keepdims=True)
    kept = jnp.sum(states.astype(acc) * dstates.astype(acc), (-2, -1), keepdims=True)
    last = jnp.sum(written, -2, keepdims=True) + x.y * kept
    dg = last + jax.lax.cumsum(dc, axis=dc.ndim - 2, reverse=True)
    return dq, dk, dg, dbeta


def _chunks(params, q, k, v, g, beta, runs, before) -> Chunks:
    """Cut whole chunks of tokens."""
    C = params.config.chunk
    B, T, K, _ = q.shape
    Z, G = T // C, v.shape[2] // K

    def cut(x):
        return x.reshape(B, Z, C, *x.shape[2:])

    g_ZBKGC = g.reshape(B, Z, C, K, G).transpose(1, 0, 3, 4, 2)
    c_ZBKGC = jnp.cumsum(g_ZBKGC, -1)
    lower = _triangle(C)
    end_ZBKG1 = c_ZBKGC[..., -1:]
    c_start, c_end, c_whole = c_ZBKGC, end_ZBKG1 - c_ZBKGC, end_ZBKG1
    if runs is not None:
        run_ZBC = cut(runs).transpose(1, 0, 2)
        last_ZB1 = run_ZBC[..., -1:]
        before_ZB1 = cut(before).transpose(1, 0, 2)[..., :1]
        lower = lower & (run_ZBC[..., :, None] == run_ZBC[..., None, :])[:, :, None, None]

        def inside(same, exponent):
            return jnp.where(same[:, :, None, None], exponent, -jnp.inf)

        c_start = inside(run_ZBC == before_ZB1, c_start)
        c_end = inside(run_ZBC == last_ZB1, c_end)
        c_whole = inside(last_ZB1 == before_ZB1, c_whole)
    # Exponents are masked before exp: above the diagonal they are positive and would overflow.
    difference = jnp.where(lower, c_ZBKGC[..., :, None] - c_ZBKGC[..., None, :], -jnp.inf)
    return Chunks(
        q=cut(q).transpose(1, 0, 3, 2, 4),
        k=cut(k).transpose(1, 0, 3, 2, 4),
        v=cut(v).reshape(B, Z, C, K, G, -1).transpose(1, 0, 3, 4, 2, 5),
        beta=cut(beta).reshape(B, Z, C, K, G).transpose(1, 0, 3, 4, 2)[..., None],
        decay=jnp.exp(difference),
        a=jnp.exp(c_start)[..., None],
        z=jnp.exp(c_end)[..., None],
        y=jnp.exp(c_whole)[..., None],
    )


def _triangle(size: int, offset: int = 0) -> Array:
    return jnp.arange(size)[:, None] + offset >= jnp.arange(size)


def _key_products(x: Chunks) -> Array:
    """B = tril(K K^T * D, -1)  [Z,B,K,G,C,C]"""
    products = dot("zbkch,zbkdh->zbkcd", x.k, x.k)[:, :, :, None] * x.decay
    return jnp.where(_triangle(x.k.shape[-2], -1), products, 0)


def _pairs(x: Chunks) -> Array:
    return x.beta * _key_products(x)


def _scores(x: Chunks) -> Array:
    """tril(Q K^T * D)  [Z,B,K,G,C,C]"""
    return dot("zbkch,zbkdh->zbkcd", x.q, x.k)[:, :, :, None] * x.decay


def _cut_values(value: Array, x: Chunks) -> Array:
    Z, B, K, G, C, E = x.v.shape
    return value.reshape(B, Z, C, K, G, E).transpose(1, 0, 3, 4, 2, 5)


def _join(value: Array) -> Array:
    """[Z,B,K,G,C,E] -> [B,T,R,E]"""
    Z, B, K, G, C, E = value.shape
    return value.transpose(1, 0, 4, 2, 3, 5).reshape(B, Z * C, K * G, E)


def _join_keys(key: Array) -> Array:
    """[Z,B,K,C,H] -> [B,T,K,H]"""
    return _join(key[:, :, :, None])


def _grouped(state: Array, x: Chunks) -> Array:
    """[B,R,H,E] -> [B,K,G,H,E]"""
    return state.reshape(*x.v.shape[1:4], *state.shape[-2:])


def _regrouped(value: Array, x: Chunks) -> Array:
    return value.reshape(*x.v.shape[:4], *value.shape[-2:])


def _ungrouped(value: Array) -> Array:
    """[Z,B,K,G,.,.] -> [Z,B,R,.,.]"""
    Z, B, K, G, *tail = value.shape
    return value.reshape(Z, B, K * G, *tail)
