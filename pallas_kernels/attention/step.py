"""Attention of one token per row over its cache.

o = sum_{s < length} softmax_s(scale q.k_s) v_s

B batch   S cache entries   N = K G query heads   K key and value heads   H head dim
"""

import jax.numpy as jnp

from pallas_kernels.attention.reference import positions
from pallas_kernels.precision import dot


def check(params) -> None:
    """Accept everything."""


def apply(params, q, k_cache, v_cache, lengths):
    """Return o [B,N,H]; a row of length 0 gives 0."""
    B, N, H = q.shape
    S, K = k_cache.shape[1:3]
    seen_B11S = (positions(S) < lengths.astype(jnp.int32)[:, None])[:, None, None]
    logits = params.scale * dot("bkgh,bskh->bkgs", q.reshape(B, K, N // K, H), k_cache)
    logits = jnp.where(seen_B11S, logits, -jnp.inf)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    o = dot("bkgs,bskh->bkgh", weights.astype(q.dtype), v_cache) / jnp.where(total > 0, total, 1)
    return o.reshape(B, N, H).astype(q.dtype)
