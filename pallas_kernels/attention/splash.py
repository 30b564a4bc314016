"""Attention on TPU by jax's splash attention, which brings its own derivative.

o_t = sum_s softmax_s(scale q_t.k_s + mask_ts) v_s

It knows causal, local and full masks, packed documents and grouped heads. A row that sees nothing
would get the mean of all values there, so that calls in which there can be one are declined.
"""

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels.attention.pallas_tpu_visits import pad, pad_last, tiles_of
from pallas_kernels.dispatch import decline

NAME = "splash"
MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"  # jax may move it
BLOCK = 1024
COMPUTE = 512  # keys at a time in the forward: statically its best on v5e and v6e
FUSED_BLOCKS = 4
HEAD_DIMS = (64, 128, 256)


def check_device(kind: str | None) -> None:
    """Decline a device that is known to be no TPU: to build its masks takes seconds."""
    if kind is not None and not kind.startswith("TPU"):
        raise decline(NAME, "runs on TPU", kind)


def check(params) -> None:
    """Decline what splash cannot do, or does otherwise than the definition."""
    try:
        importlib.import_module(MODULE)
    except ImportError as error:
        raise decline(NAME, f"needs {MODULE}", error) from error
    if params.dtype != jnp.bfloat16:
        raise decline(NAME, "takes bfloat16", params.dtype)
    if params.shape_q[3] not in HEAD_DIMS:
        raise decline(NAME, f"needs a head dim in {HEAD_DIMS}", params.shape_q[3])
    if params.q_offset is None:
        raise decline(NAME, "needs a static q_offset", "an array")
    if params.paired:
        raise decline(NAME, "needs ids of one packed row", "ids of queries and keys apart")
    if params.causal and params.q_offset < 0:
        raise decline(NAME, "needs a q_offset of at least 0", params.q_offset)
    T, S = params.shape_q[1], params.shape_k[1]
    if params.window is not None and params.q_offset + T > S:
        raise decline(NAME, "needs a key for every query of a window", (params.q_offset + T, S))
    if not params.causal and S % 128:
        raise decline(NAME, "needs a multiple of 128 keys unless causal", S)
    if params.causal and params.q_offset + T > S and S % 128:
        raise decline(NAME, "needs a multiple of 128 keys or a last key for every query", (T, S))


def apply(params, q, k, v, q_ids, kv_ids, offset):
    """Return o [B,T,N,H]."""
    del offset  # declined above
    splash_attention = importlib.import_module(MODULE)
    tiles = tiles_of(params, BLOCK)
    # Keys that fill up a block lie behind every query; queries that do are cut off.
    q_BNTH, k_BKSH, v_BKSH = (
        pad(x.swapaxes(1, 2), size, 2)
        for x, size in ((q, tiles.rows), (k, tiles.columns), (v, tiles.columns))
    )
    q_BNTH *= params.scale
    kernel = _kernel(splash_attention, params, tiles, q_BNTH.shape[2], k_BKSH.shape[2])
    if q_ids is None:
        o = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    else:
        ids = splash_attention.SegmentIds(
            pad_last(q_ids, tiles.rows), pad_last(kv_ids, tiles.columns)
        )
        o = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, ids)
    return o[:, :, : params.shape_q[1]].swapaxes(1, 2)


def _kernel(splash_attention, params, tiles, T: int, S: int):
    heads = params.shape_q[2]
    if not params.causal:
        mask = splash_attention.FullMask((T, S))
    elif params.window is None:
        mask = splash_attention.CausalMask((T, S), offset=params.q_offset)
    else:
        mask = splash_attention.LocalMask((T, S), (params.window - 1, 0), offset=params.q_offset)
    # The fused backward holds a dq for every block of keys.
    fused = tiles.counts[1] <= FUSED_BLOCKS
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=tiles.rows,
            block_kv=tiles.columns,
            block_kv_compute=COMPUTE if tiles.columns % COMPUTE == 0 else tiles.columns,
            block_q_dkv=tiles.rows,
            block_kv_dkv=tiles.columns,
            block_kv_dkv_compute=tiles.columns,
            block_q_dq=None if fused else tiles.rows,
            block_kv_dq=None if fused else tiles.columns,
            use_fused_bwd_kernel=fused,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attn_out",
    )
