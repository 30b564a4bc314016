"""Attention in blocks of queries and keys with O(T + S) memory, forward and backward, as plain XLA.

    s = scale q.k    m = max s    p = exp(s - m)    l = sum p    o = (p v) / l    lse = m + log l
    p = exp(s - lse)    dv = p^T do    ds = p (do.v - do.o)    dq = scale ds k    dk = scale ds^T q

(FlashAttention-2, arXiv:2307.08691.) One scan walks over the pairs of blocks that the causal mask
and the window leave, a list made while tracing. Short inputs take one dense tile instead, which
XLA fuses well. Matmul operands have the input dtype; logits and sums are fp32.

    B batch   T query tokens   S key tokens   N = K G query heads   K key and value heads
    H head dim   Queries of one key head are the rows [T, G] of one matmul: k and v are not repeated
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.reference import positions, visible
from pallas_kernels.precision import accumulator, dot

# Up to this many logits for each row and head the dense tile is faster than the scan.
DENSE_LOGITS = 1024 * 1024
BLOCK = 512


def check(params) -> None:
    """Accept everything."""


def forward(params, q, k, v, q_ids, kv_ids, offset):
    """Return (o [B,T,N,H], lse [B,T,N] fp32)."""
    q_BKTGH, k_BKSH, v_BKSH = _heads_first(q, k), _keys_first(k), _keys_first(v)
    if _is_dense(params):
        mask = _dense_mask(params, q_ids, kv_ids, offset)
        top, total, o = _tile(params, q_BKTGH, k_BKSH, v_BKSH, mask)
    else:
        top, total, o = _scan_forward(params, q_BKTGH, k_BKSH, v_BKSH, q_ids, kv_ids, offset)
    seen = total > 0
    o = o / jnp.where(seen, total, 1)[..., None]
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), jnp.inf)
    T = q.shape[1]
    o, lse = _heads_last(o[:, :, :T]), _heads_last(lse[:, :, :T, :, None])[..., 0]
    return o.astype(q.dtype), lse


def backward(params, q, k, v, q_ids, kv_ids, offset, o, lse, do):
    """Return the gradients of q, k and v, recomputing the weights from lse."""
    acc = accumulator(q.dtype)
    delta = jnp.sum(do.astype(acc) * o.astype(acc), -1, keepdims=True)
    q_BKTGH, k_BKSH, v_BKSH, do_BKTGH = (
        _heads_first(q, k),
        _keys_first(k),
        _keys_first(v),
        _heads_first(do, k),
    )
    lse, delta = _heads_first(lse[..., None], k), _heads_first(delta, k)
    rows = (q_BKTGH, do_BKTGH, lse, delta)
    if _is_dense(params):
        mask = _dense_mask(params, q_ids, kv_ids, offset)
        dq, dk, dv = _tile_gradients(params, *rows, k_BKSH, v_BKSH, mask)
    else:
        dq, dk, dv = _scan_backward(params, rows, k_BKSH, v_BKSH, q_ids, kv_ids, offset)
    T, S = q.shape[1], k.shape[1]
    dk, dv = (jnp.swapaxes(x[:, :, :S], 1, 2).astype(q.dtype) for x in (dk, dv))
    return _heads_last(dq[:, :, :T]).astype(q.dtype), dk, dv


def _is_dense(params) -> bool:
    return params.shape_q[1] * params.shape_k[1] <= DENSE_LOGITS


def _tile(params, q, k, v, mask):
    """Attend inside one tile: row maximum and sum [B,K,T,G], unnormalised output [B,K,T,G,H]."""
    logits = _logits(params, q, k, mask)
    top = logits.max(-1)
    weights = jnp.exp(logits - _finite(top)[..., None])
    o = dot("bktgs,bksh->bktgh", weights.astype(q.dtype), v)
    return top, weights.sum(-1), o


def _tile_gradients(params, q, do, lse, delta, k, v, mask):
    weights = jnp.exp(_logits(params, q, k, mask) - lse)
    dv = dot("bktgs,bktgh->bksh", weights.astype(q.dtype), do)
    dweights = dot("bktgh,bksh->bktgs", do, v)
    dlogits = (params.scale * weights * (dweights - delta)).astype(q.dtype)
    dq = dot("bktgs,bksh->bktgh", dlogits, k)
    dk = dot("bktgs,bktgh->bksh", dlogits, q)
    return dq, dk, dv


def _logits(params, q, k, mask):
    logits = params.scale * dot("bktgh,bksh->bktgs", q, k)
    return logits if mask is None else jnp.where(mask, logits, -jnp.inf)


def _finite(top):
    """Replace the maximum of rows that see nothing, where -inf - -inf would be NaN."""
    return jnp.where(top == -jnp.inf, 0, top)


def _merge(one, two):
    """Join the softmax of two sets of keys."""
    top = jnp.maximum(one[0], two[0])
    scale_one, scale_two = jnp.exp(one[0] - _finite(top)), jnp.exp(two[0] - _finite(top))
    total = one[1] * scale_one + two[1] * scale_two
    return top, total, one[2] * scale_one[..., None] + two[2] * scale_two[..., None]


def _scan_forward(params, q, k, v, q_ids, kv_ids, offset):
    acc = accumulator(q.dtype)
    (rows, columns), pairs = _blocks(params)
    q, k, v = _pad(q, rows, 2), _pad(k, columns, 2), _pad(v, columns, 2)
    ids = _pad(q_ids, rows, 1), _pad(kv_ids, columns, 1)
    top = jnp.full(q.shape[:-1], -jnp.inf, acc)
    carry = (top, jnp.zeros_like(top), jnp.zeros(q.shape, acc))

    def pair(carry, start):
        row, column = start[0], start[1]
        mask = _block_mask(params, ids, offset, row, column, rows, columns)
        tile = _tile(
            params, _cut(q, row, rows), _cut(k, column, columns), _cut(v, column, columns), mask
        )
        merged = _merge([_cut(x, row, rows) for x in carry], tile)
        return tuple(_put(x, y, row) for x, y in zip(carry, merged, strict=True)), None

    return jax.lax.scan(pair, carry, pairs)[0]


def _scan_backward(params, rows_args, k, v, q_ids, kv_ids, offset):
    acc = accumulator(k.dtype)
    (rows, columns), pairs = _blocks(params)
    q, do, lse, delta = rows_args
    # Rows added up to a full block have an infinite lse, hence weights of 0.
    lse = _pad(lse, rows, 2, jnp.inf)
    q, do, delta = _pad(q, rows, 2), _pad(do, rows, 2), _pad(delta, rows, 2)
    k, v = _pad(k, columns, 2), _pad(v, columns, 2)
    ids = _pad(q_ids, rows, 1), _pad(kv_ids, columns, 1)

    def pair(carry, start):
        row, column = start[0], start[1]
        mask = _block_mask(params, ids, offset, row, column, rows, columns)
        tile = _tile_gradients(
            params,
            *(_cut(x, row, rows) for x in (q, do, lse, delta)),
            *(_cut(x, column, columns) for x in (k, v)),
            mask,
        )
        sizes = ((row, rows), (column, columns), (column, columns))
        return tuple(
            _put(x, _cut(x, *at) + y, at[0]) for x, y, at in zip(carry, tile, sizes, strict=True)
        ), None

    carry = tuple(jnp.zeros(x.shape, acc) for x in (q, k, v))
    return jax.lax.scan(pair, carry, pairs)[0]


def _blocks(params):
    """Block sizes of queries and keys, and the starts of the pairs that can see each other."""
    T, S = params.shape_q[1], params.shape_k[1]
    rows, columns = min(BLOCK, T), min(BLOCK, S)
    pairs = [
        (row, column)
        for row in range(0, T, rows)
        for column in range(0, S, columns)
        if _can_see(params, row, column, rows, columns)
    ]
    return (rows, columns), np.array(pairs, np.int32).reshape(-1, 2)


def _can_see(params, row, column, rows, columns) -> bool:
    if params.q_offset is None or not params.causal:
        return True
    first, last = params.q_offset + row, params.q_offset + row + rows - 1
    if column > last:
        return False
    return params.window is None or first - (column + columns - 1) < params.window


def _block_mask(params, ids, offset, row, column, rows, columns):
    q_ids, kv_ids = ids
    if q_ids is not None:
        q_ids = jax.lax.dynamic_slice_in_dim(q_ids, row, rows, 1)
        kv_ids = jax.lax.dynamic_slice_in_dim(kv_ids, column, columns, 1)
    S = params.shape_k[1]
    at = column + positions(columns)
    mask = visible(params, q_ids, kv_ids, offset, row + positions(rows), at)
    if S % columns:
        mask &= at < S
    return mask[:, None, :, None]


def _dense_mask(params, q_ids, kv_ids, offset):
    if not params.causal and q_ids is None:
        return None
    rows, columns = (positions(shape[1]) for shape in (params.shape_q, params.shape_k))
    return visible(params, q_ids, kv_ids, offset, rows, columns)[:, None, :, None]


def _cut(x, start, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size, 2)


def _put(x, update, start):
    return jax.lax.dynamic_update_slice_in_dim(x, update, start, 2)


def _pad(x, multiple: int, axis: int, value=0):
    if x is None or x.shape[axis] % multiple == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def _heads_first(x, k):
    """[B,T,N,.] -> [B,K,T,G,.]"""
    B, T, N, D = x.shape
    K = k.shape[2]
    return x.reshape(B, T, K, N // K, D).transpose(0, 2, 1, 3, 4)


def _heads_last(x):
    """[B,K,T,G,.] -> [B,T,N,.]"""
    B, K, T, G, D = x.shape
    return x.transpose(0, 2, 1, 3, 4).reshape(B, T, K * G, D)


def _keys_first(x):
    """[B,S,K,H] -> [B,K,S,H]"""
    return jnp.swapaxes(x, 1, 2)
