"""Dense softmax attention at full precision, the definition; JAX differentiates it.

o_t = sum_s softmax_s(scale q_t.k_s + mask_ts) v_s          0 where the mask leaves no key

B batch   T query tokens   S key tokens   N = K G query heads   K key and value heads
H head dim
"""

import jax.numpy as jnp

from pallas_kernels.precision import accumulator, dot


def check(params) -> None:
    """Accept everything."""


def positions(size: int):
    """0 ... size - 1 as int32, whatever the x64 mode: offsets and ids are int32."""
    return jnp.arange(size, dtype=jnp.int32)


def visible(params, q_ids, kv_ids, offset, rows, columns):
    """Say which keys (absolute `columns`) each query (`rows`, counted from 0) sees.

    Broadcasts to [B,T,S]; the batch axis is 1 unless ids or offsets differ by row.
    """
    start = params.q_offset if offset is None else offset[:, None, None]
    ahead = rows[None, :, None] + start - columns[None, None, :]
    mask = jnp.ones(ahead.shape, bool)
    if params.causal:
        mask = ahead >= 0
    if params.window is not None:
        mask &= ahead < params.window
    if q_ids is not None:
        mask &= q_ids[:, :, None] == kv_ids[:, None, :]
    return mask


def apply(params, q, k, v, q_ids, kv_ids, offset):
    """Return o [B,T,N,H]."""
    T, S = q.shape[1], k.shape[1]
    mask = visible(params, q_ids, kv_ids, offset, positions(T), positions(S))
    return _softmax(params.scale, q, k, v, mask)


def apply_step(params, q, k_cache, v_cache, lengths):
    """Return o [B,N,H]."""
    mask = positions(k_cache.shape[1]) < lengths.astype(jnp.int32)[:, None, None]
    return _softmax(params.scale, q[:, None], k_cache, v_cache, mask)[:, 0]


def _softmax(scale, q, k, v, mask):
    acc, (B, T, N, H), K = accumulator(q.dtype), q.shape, k.shape[2]
    q_BTKGH = q.astype(acc).reshape(B, T, K, N // K, H)
    logits = scale * dot("btkgh,bskh->bkgts", q_BTKGH, k.astype(acc), "highest")
    mask = mask[:, None, None]
    # Finite logits everywhere keep the gradient of a row that sees nothing at 0 instead of NaN.
    logits = jnp.where(mask, logits, 0)
    weights = jnp.where(mask, jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    o = dot("bkgts,bskh->btkgh", weights, v.astype(acc), "highest")
    return o.reshape(B, T, N, H).astype(q.dtype)
