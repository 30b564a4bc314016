"""Attention in blocks of queries and keys with O(T + S) memory, forward and backward, as plain XLA.

    s = scale q.k    m = max s    p = exp(s - m)    l = sum p    o = (p v) / l    lse = m + log l
    p = exp(s - lse)    dv = p^T do    ds = p (do.v - do.o)    dq = scale ds k    dk = scale ds^T q

(FlashAttention-2, arXiv:2307.08691.) One scan walks over the pairs of blocks that the causal mask
and the window leave, a list made while tracing. Short inputs take one dense tile instead, which
XLA fuses well. Matmul operands have the input dtype; logits and sums are fp32.

    B batch   T query tokens   S key tokens   N = K G query heads   K key and value heads
    H head dim   U = T G rows, the queries of one key head token by token: they are the rows of one
    matmul, so k and v are never repeated
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.reference import positions, visible
from pallas_kernels.precision import accumulator, dot
from pallas_kernels.zeros import zeros_after

# Up to this many logits for each row and head one tile does it all: no scan, no carries.
DENSE_LOGITS = 1024 * 1024
BLOCK = 1024


def check(params) -> None:
    """Accept everything."""


def forward(params, q, k, v, q_ids, kv_ids, offset):
    """Return (o [B,T,N,H], lse [B,T,N] fp32)."""
    q_BKUH, k_BKSH, v_BKSH = _heads_first(q, k), _keys_first(k), _keys_first(v)
    if _is_dense(params):
        mask = _dense_mask(params, q_ids, kv_ids, offset)
        top, total, o = _tile(params, q_BKUH, k_BKSH, v_BKSH, mask)
    else:
        top, total, o = _scan_forward(params, q_BKUH, k_BKSH, v_BKSH, q_ids, kv_ids, offset)
    seen = total > 0
    o = o / jnp.where(seen, total, 1)[..., None]
    lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), jnp.inf)
    return _heads_last(params, o).astype(q.dtype), _heads_last(params, lse[..., None])[..., 0]


def backward(params, q, k, v, q_ids, kv_ids, offset, o, lse, do):
    """Return the gradients of q, k and v, recomputing the weights from lse."""
    acc = accumulator(q.dtype)
    delta = jnp.sum(do.astype(acc) * o.astype(acc), -1, keepdims=True)
    q_BKUH, k_BKSH, v_BKSH, do_BKUH = (
        _heads_first(q, k),
        _keys_first(k),
        _keys_first(v),
        _heads_first(do, k),
    )
    lse, delta = _heads_first(lse[..., None], k), _heads_first(delta, k)
    rows = (q_BKUH, do_BKUH, lse, delta)
    if _is_dense(params):
        mask = _dense_mask(params, q_ids, kv_ids, offset)
        dq, dk, dv = _tile_gradients(params, *rows, k_BKSH, v_BKSH, mask)
    else:
        dq, dk, dv = _scan_backward(params, rows, k_BKSH, v_BKSH, q_ids, kv_ids, offset)
    S = k.shape[1]
    dk, dv = (jnp.swapaxes(x[:, :, :S], 1, 2).astype(q.dtype) for x in (dk, dv))
    return _heads_last(params, dq).astype(q.dtype), dk, dv


def _is_dense(params) -> bool:
    return params.shape_q[1] * params.shape_k[1] <= DENSE_LOGITS


def _tile(params, q, k, v, mask):
    """Attend inside one tile: row maximum and sum [B,K,U], unnormalised output [B,K,U,H]."""
    logits = _logits(params, q, k, mask)
    top = logits.max(-1)
    weights = jnp.exp(logits - _finite(top)[..., None])
    o = dot("bkus,bksh->bkuh", weights.astype(q.dtype), v)
    return top, weights.sum(-1), o


def _tile_gradients(params, q, do, lse, delta, k, v, mask):
    weights = jnp.exp(_logits(params, q, k, mask) - lse)
    dv = dot("bkus,bkuh->bksh", weights.astype(q.dtype), do)
    dweights = dot("bkuh,bksh->bkus", do, v)
    dlogits = (params.scale * weights * (dweights - delta)).astype(q.dtype)
    dq = dot("bkus,bksh->bkuh", dlogits, k)
    dk = dot("bkus,bkuh->bksh", dlogits, q)
    return dq, dk, dv


def _logits(params, q, k, mask):
    logits = params.scale * dot("bkuh,bksh->bkus", q, k)
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
    ids = _pad(_row_ids(params, q_ids), rows, 1), _pad(kv_ids, columns, 1)
    total, o = (zeros_after(q, shape, acc) for shape in (q.shape[:-1], q.shape))
    carry = (total - jnp.inf, total, o)

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
    ids = _pad(_row_ids(params, q_ids), rows, 1), _pad(kv_ids, columns, 1)

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

    start = tuple(zeros_after(x, x.shape, acc) for x in (q, k, v))
    return jax.lax.scan(pair, start, pairs)[0]


def _blocks(params):
    """Rows and columns of a block, and the starts (row, column) of the pairs with work."""
    T, S, G = params.shape_q[1], params.shape_k[1], _group(params)
    tokens, columns = min(BLOCK, T), min(BLOCK, S)
    pairs = [
        (token * G, column)
        for token in range(0, T, tokens)
        for column in range(0, S, columns)
        if _can_see(params, token, column, tokens, columns)
    ]
    return (tokens * G, columns), np.array(pairs, np.int32).reshape(-1, 2)


def _can_see(params, token, column, tokens, columns) -> bool:
    if params.q_offset is None or not params.causal:
        return True
    first, last = params.q_offset + token, params.q_offset + token + tokens - 1
    if column > last:
        return False
    return params.window is None or first - (column + columns - 1) < params.window


def _block_mask(params, ids, offset, row, column, rows, columns):
    row_ids, kv_ids = ids
    if row_ids is not None:
        row_ids = jax.lax.dynamic_slice_in_dim(row_ids, row, rows, 1)
        kv_ids = jax.lax.dynamic_slice_in_dim(kv_ids, column, columns, 1)
    S = params.shape_k[1]
    at = column + positions(columns)
    tokens = (row + positions(rows)) // _group(params)
    mask = visible(params, row_ids, kv_ids, offset, tokens, at)
    if S % columns:
        mask &= at < S
    return mask[:, None]


def _dense_mask(params, q_ids, kv_ids, offset):
    if not params.causal and q_ids is None:
        return None
    rows, columns = params.shape_q[1] * _group(params), params.shape_k[1]
    tokens = positions(rows) // _group(params)
    row_ids = _row_ids(params, q_ids)
    return visible(params, row_ids, kv_ids, offset, tokens, positions(columns))[:, None]


def _group(params) -> int:
    """Query heads of one key head."""
    return params.shape_q[2] // params.shape_k[2]


def _row_ids(params, q_ids):
    """[B,T] -> [B,U]"""
    return None if q_ids is None else jnp.repeat(q_ids, _group(params), axis=1)


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
    """[B,T,N,.] -> [B,K,U,.]"""
    B, T, N, D = x.shape
    K = k.shape[2]
    return x.reshape(B, T, K, N // K, D).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, D)


def _heads_last(params, x):
    """[B,K,U and padding,.] -> [B,T,N,.]"""
    (B, T, N, _), K, G = params.shape_q, params.shape_k[2], _group(params)
    return x[:, :, : T * G].reshape(B, K, T, G, -1).transpose(0, 2, 1, 3, 4).reshape(B, T, N, -1)


def _keys_first(x):
    """[B,S,K,H] -> [B,K,S,H]"""
    return jnp.swapaxes(x, 1, 2)
