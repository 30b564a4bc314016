"""Attention as others compute it on CUDA, to measure ours against: cuDNN over packed documents.

jax has no public way to it. `jax.nn.dot_product_attention` packs nothing, so beside the private
call the same documents are measured as rows of a batch, which is what cuDNN is fastest at.

    B rows   T tokens   N query heads   K key heads   H head dim   M documents of a row
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["PACKED"]


def packed(document: int) -> Callable:
    """`run(q, k, v)` over rows of documents of equal length, by cuDNN's ragged layout."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")

    def run(q, k, v):
        B, T, _, H = q.shape
        M = T // document
        lengths = jnp.full((B, M), document, jnp.int32)
        offsets = jnp.broadcast_to(jnp.arange(M + 1, dtype=jnp.int32) * document, (B, M + 1))
        return cudnn.dot_product_attention(
            q,
            k,
            v,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=offsets,
            kv_offsets=offsets,
            scale=H**-0.5,
            mask_type=cudnn.MaskType.PADDING_CAUSAL,
        )

    return run


def as_rows(document: int) -> Callable:
    """`run(q, k, v)` with every document a row of its own."""

    def run(q, k, v):
        cut = (x.reshape(-1, document, *x.shape[2:]) for x in (q, k, v))
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True)
        return attend(*cut, implementation="cudnn").reshape(q.shape)

    return run


PACKED = {"cudnn_packed": packed, "cudnn_rows": as_rows}
