"""Attention on NVIDIA Hopper in Mosaic GPU kernels: what they take, and how they are called.

A query's mask is one range of keys, [first, end): causality, a window and documents in order all
are. The ranges say which blocks a tile walks over and where its edges need a mask, so that packed
documents cost what they hold and an offset nothing.

    B batch   T query tokens   S key tokens   N = K G query heads   K key heads   H head dim
    R queries of a tile of the backward kernel
"""

import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.attention import mosaic_gpu_backward, mosaic_gpu_forward
from pallas_kernels.attention.mosaic_gpu_tiles import KEYS, LOG2E, QUERIES
from pallas_kernels.attention.reference import positions
from pallas_kernels.dispatch import decline

HEAD_DIMS = (64, 128)


def check(params) -> None:
    """Decline below jax 0.11 and what the kernels are not written for."""
    hopper.check_version()
    if params.dtype != jnp.bfloat16:
        raise decline(hopper.NAME, "takes bfloat16", params.dtype)
    if params.shape_q[3] not in HEAD_DIMS:
        raise decline(hopper.NAME, f"needs a head dim in {HEAD_DIMS}", params.shape_q[3])
    if params.scale <= 0:
        raise decline(hopper.NAME, "needs a positive scale", params.scale)
    if params.segmented and not params.ordered:
        raise decline(hopper.NAME, "needs documents in order", "a pair of segment ids")


def forward(params, q, k, v, q_ids, kv_ids, offset):
    """Return (o [B,T,N,H], lse [B,T,N] fp32)."""
    T = params.shape_q[1]
    first, end = ranges(params, q_ids, kv_ids, offset)
    rows = jnp.stack([_pad(x, QUERIES, 1, "edge") for x in (first, end)], 1)
    q, k, v = _pad(q, QUERIES, 1), _pad(k, KEYS, 1), _pad(v, KEYS, 1)
    o, lse = mosaic_gpu_forward.forward(params.scale, q, k, v, rows, walks(*rows.swapaxes(0, 1)))
    return o[:, :T], lse[:, :, :T].swapaxes(1, 2)


def backward(params, q, k, v, q_ids, kv_ids, offset, o, lse, do):
    """Return the gradients of q, k and v, recomputing the weights from lse."""
    (_, T, _, H), S = params.shape_q, params.shape_k[1]
    R = mosaic_gpu_backward.tile_rows(H)
    first, end = (_pad(x, R, 1, "edge") for x in ranges(params, q_ids, kv_ids, offset))
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1)
    # Rows that fill up a tile have an infinite lse, hence weights of 0.
    lse = _pad(lse.swapaxes(1, 2) * LOG2E, R, 2, constant_values=jnp.inf)
    rows = statistics(R, lse, _pad(delta.swapaxes(1, 2), R, 2), first, end)
    q, do, k, v = _pad(q, R, 1), _pad(do, R, 1), _pad(k, KEYS, 1), _pad(v, KEYS, 1)
    seen = spans(R, k.shape[1] // KEYS, first, end)
    dq, dk, dv = mosaic_gpu_backward.backward(params.scale, q, k, v, do, rows, seen)
    dq = (params.scale * dq.sum(0)[:, :T]).astype(q.dtype)
    return dq, dk[:, :S], dv[:, :S]


def ranges(params, q_ids, kv_ids, offset):
    """First key that each query sees and the one behind the last, [B,T] int32 each.

    The end lies not behind the first where a query sees nothing.
    """
    (B, T, _, _), S = params.shape_q, params.shape_k[1]
    start = jnp.int32(params.q_offset) if offset is None else offset[:, None]
    at = jnp.broadcast_to(start + positions(T), (B, T))
    first, end = jnp.zeros((B, T), jnp.int32), jnp.full((B, T), S, jnp.int32)
    if params.causal:
        end = jnp.clip(at + 1, 0, S)
    if params.window is not None:
        first = jnp.maximum(at - params.window + 1, 0)
    if q_ids is not None:
        starts = _starts(kv_ids)
        first = jnp.maximum(first, jnp.take_along_axis(starts, q_ids, 1))
        end = jnp.minimum(end, jnp.take_along_axis(starts, q_ids + 1, 1))
    return first, end


def walks(first, end):
    """Blocks of keys of every tile of queries, [B,T/QUERIES,4] int32.

    From the first of the tile to the end, with those between that all of its rows see whole.
    """
    first, end = (x.reshape(x.shape[0], -1, QUERIES) for x in (first, end))
    some = end > first
    begin = jnp.where(some, first, jnp.iinfo(jnp.int32).max).min(-1) // KEYS
    stop = -(-jnp.where(some, end, 0).max(-1) // KEYS)
    begin = jnp.minimum(begin, stop)
    opened = jnp.where(some.all(-1), -(-first.max(-1) // KEYS), stop).clip(begin, stop)
    closed = (end.min(-1) // KEYS).clip(opened, stop)
    return jnp.stack([begin, opened, closed, stop], -1)


def spans(R: int, blocks: int, first, end):
    """First tile of R queries that sees each block of keys and the one behind the last."""
    first, end = (x.reshape(x.shape[0], 1, -1, R) for x in (first, end))
    some = end > first
    low = jnp.where(some, first, jnp.iinfo(jnp.int32).max).min(-1)
    high = jnp.where(some, end, 0).max(-1)
    start, tile = positions(blocks)[:, None] * KEYS, positions(first.shape[2])
    sees = (low < start + KEYS) & (high > start)
    last = jnp.where(sees, tile + 1, 0).max(-1)
    return jnp.stack([jnp.where(sees, tile, last[..., None]).min(-1), last], -1)


def statistics(R: int, lse, delta, first, end):
    """What the backward kernel reads of a tile's rows, [B,N,T/R,6,R] fp32 (exact to 2^24 keys)."""

    def tiled(x):
        return jnp.broadcast_to(x, lse.shape).reshape(*lse.shape[:2], -1, R).astype(jnp.float32)

    lse, delta, first, end = map(tiled, (lse, delta, first[:, None], end[:, None]))
    most, least = first.max(-1, keepdims=True), end.min(-1, keepdims=True)
    whole = (jnp.broadcast_to(x, lse.shape) for x in (most, least))
    return jnp.stack([lse, delta, first, end, *whole], 3)


def _starts(runs):
    """Where the documents begin, by their numbers [B,S+1]; S behind the last."""
    B, S = runs.shape
    change = jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    rows, nowhere = positions(B)[:, None], S + 1
    starts = jnp.full((B, S + 1), S, jnp.int32)
    at = jnp.where(change, runs, nowhere)
    return starts.at[rows, at].set(jnp.broadcast_to(positions(S), (B, S)), mode="drop")


def _pad(x, multiple: int, axis: int, mode="constant", **kwargs):
    rest = -x.shape[axis] % multiple
    if not rest:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, rest)
    return jnp.pad(x, widths, mode, **kwargs)
