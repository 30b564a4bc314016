"""Attention on TPU in Pallas kernels of our own: what they take, and how they are called.

B batch   T query tokens   S key tokens   N query heads   K key and value heads   H head dim
"""

import math

import jax.numpy as jnp

from pallas_kernels.attention import pallas_tpu_tiles as tiling
from pallas_kernels.attention.pallas_tpu_backward import backward_kernel
from pallas_kernels.attention.pallas_tpu_forward import forward_kernel
from pallas_kernels.attention.pallas_tpu_visits import most_visits, pad, tiles_of
from pallas_kernels.dispatch import decline

NAME = "pallas_tpu"
HEAD_DIMS = (64, 128)
BLOCK = 1024  # tokens; fp32, whose products take six passes, is for checks and not for speed
SMEM = 2**19  # bytes of 1 MiB
# Where its static cycles beat those of splash: v5e, v5p, v6e and 7x.
DEVICES = ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")


def check(params) -> None:
    """Decline what the kernels are not written for."""
    if params.dtype not in (jnp.bfloat16, jnp.float32):
        raise decline(NAME, "takes bfloat16 or float32", params.dtype)
    if params.shape_q[3] not in HEAD_DIMS:
        raise decline(NAME, f"needs a head dim in {HEAD_DIMS}", params.shape_q[3])
    if params.scale <= 0:
        raise decline(NAME, "needs a positive scale", params.scale)
    size = 4 * params.shape_q[0] * most_visits(params, _tiles(params))
    if size > SMEM:
        raise decline(NAME, f"needs a list of visits of at most {SMEM} bytes", size)


def check_device(kind: str | None) -> None:
    """Decline chips for which it has not been compiled; None is one not known while tracing."""
    if kind not in DEVICES:
        raise decline(NAME, f"is scheduled for {', '.join(DEVICES)}", kind)


def forward(params, q, k, v, q_ids, kv_ids, offset):
    """Return (o [B,T,N,H], lse [B,T,N] fp32)."""
    tiles = _tiles(params)
    q, k, v = _views(tiles, q, k, v)
    o, lse = forward_kernel(params, tiles, q, k, v, q_ids, kv_ids, offset)
    T = params.shape_q[1]
    return tiling.unview(o, params.shape_q), lse[:, :, 0, :T].swapaxes(1, 2)


def backward(params, q, k, v, q_ids, kv_ids, offset, o, lse, do):
    """Return the gradients of q, k and v, recomputing the weights from lse."""
    tiles = _tiles(params)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1)
    # Rows that fill up a block have an infinite lse, hence weights of 0.
    lse, delta = (
        pad(x.swapaxes(1, 2)[:, :, None], tiles.rows, 3, fill)
        for x, fill in ((lse * math.log2(math.e), jnp.inf), (delta, 0))
    )
    do = pad(tiling.view(do), tiles.rows, 1)
    dq, dk, dv = backward_kernel(
        params, tiles, *_views(tiles, q, k, v), q_ids, kv_ids, offset, do, lse, delta
    )
    T = params.shape_q[1]
    dq = (params.scale * dq[..., :T]).transpose(0, 3, 1, 2).astype(q.dtype)
    return dq, _of_key_heads(params, dk), _of_key_heads(params, dv)


def _of_key_heads(params, x):
    """Add the groups of a key head."""
    B, S, K, H = params.shape_k
    groups = x.size // (B * K * H * x.shape[1])
    x = tiling.unview(x, (B, S, K * groups, H))
    return x if groups == 1 else x.reshape(B, S, K, groups, H).sum(3).astype(params.dtype)


def block(params) -> int:
    """Tokens of a block at most."""
    return BLOCK if params.dtype == jnp.bfloat16 else BLOCK // 2


def _tiles(params):
    return tiles_of(params, block(params))


def _views(tiles, q, k, v):
    q = pad(tiling.view(q), tiles.rows, 1)
    return q, *(pad(tiling.view(x), tiles.columns, 1) for x in (k, v))
