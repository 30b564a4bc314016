"""Attention by cuDNN through `jax.nn.dot_product_attention`, which brings its own derivative.

o_t = sum_s softmax_s(scale q_t.k_s + mask_ts) v_s
"""

import importlib.util

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import decline

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def check(params) -> None:
    """Decline what cuDNN cannot do, or what only its private interface can."""
    if params.dtype not in (jnp.bfloat16, jnp.float16):
        raise decline("cudnn", "needs bfloat16 or float16", params.dtype)
    head_dim = params.shape_q[-1]
    if head_dim > 256 or head_dim % 8:
        raise decline("cudnn", "needs a head dim of at most 256 and a multiple of 8", head_dim)
    if params.segmented:
        raise decline("cudnn", "packed documents need its private interface", "segment_ids")
    if params.q_offset != 0:
        offset = "an array" if params.q_offset is None else params.q_offset
        raise decline("cudnn", "needs q_offset 0", offset)
    if params.window is not None:
        raise decline("cudnn", "takes no window here", params.window)
    if params.causal and params.shape_q[1] != params.shape_k[1]:
        lengths = (params.shape_q[1], params.shape_k[1])
        raise decline("cudnn", "needs as many queries as keys when causal", lengths)
    # jax.nn looks for the library while tracing, so a host without it cannot even trace the call.
    if not any(importlib.util.find_spec(name) for name in _PLUGINS):
        found = f"none of {', '.join(_PLUGINS)}"
        raise decline("cudnn", "needs a CUDA build of jax on the tracing host", found)


def apply(params, q, k, v, q_ids, kv_ids, offset):
    """Return o [B,T,N,H]."""
    del q_ids, kv_ids, offset  # declined above
    return jax.nn.dot_product_attention(
        q, k, v, scale=params.scale, is_causal=params.causal, implementation="cudnn"
    )
