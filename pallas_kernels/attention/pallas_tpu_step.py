"""One token a row over its cache on TPU: blocks behind a row's length are not even fetched.

    m = max s    p = exp2(s - m)    l = sum p    o = (p v) / l          s = scale log2(e) q k^T

A step of the grid takes one block of all heads' keys and values. Heads of 64 dims lie two by two in
128 lanes: a query is put into the lanes of its key head, zeros beside it, and one product serves
both heads of a pair; of its result the query's own lanes are kept.

    B batch   S cache entries   N query heads   K key and value heads   H head dim
    U units of 128 lanes   R queries of a unit
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.pallas_tpu import HEAD_DIMS, NAME
from pallas_kernels.attention.pallas_tpu_tiles import NN, NT, dot
from pallas_kernels.attention.pallas_tpu_visits import LANES
from pallas_kernels.dispatch import decline

__all__ = ["apply", "check"]

BLOCK = 512  # cache entries
VMEM = 64 * 2**20
LOWEST = -1e30  # a maximum to start from, finite: exp2(-inf - LOWEST) is 0 and not NaN


def check(params) -> None:
    """Decline what the kernel is not written for."""
    if params.dtype not in (jnp.bfloat16, jnp.float32):
        raise decline(NAME, "takes bfloat16 or float32", params.dtype)
    _, _, K, H = params.shape_k
    if H not in HEAD_DIMS:
        raise decline(NAME, f"needs a head dim in {HEAD_DIMS}", H)
    window = 4 * BLOCK * K * H * params.dtype.itemsize  # keys and values, each twice
    if window > VMEM // 2:
        raise decline(NAME, f"needs windows of at most {VMEM // 2} bytes in VMEM", window)


def apply(params, q, k_cache, v_cache, lengths):
    """Return o [B,N,H]; a row of length 0 gives 0."""
    (B, S, K, H), N = k_cache.shape, q.shape[1]
    lengths = lengths.astype(jnp.int32)
    side = LANES // H  # key heads side by side
    units, own = -(-K // side), jnp.arange(K) % side
    lanes = jax.nn.one_hot(own, side, dtype=q.dtype)
    q_BKGSH = q.reshape(B, K, N // K, 1, H) * lanes[None, :, None, :, None]
    q_BURL = jnp.pad(q_BKGSH, ((0, 0), (0, units * side - K), *((0, 0),) * 3))
    q_BURL = q_BURL.reshape(B, units, side * N // K, LANES)
    size = min(BLOCK, -(-S // LANES) * LANES)
    o = _call(params.scale, size, q_BURL, k_cache, v_cache, lengths)
    o = o.reshape(B, units * side, N // K, side, H)[:, :K]
    o = jnp.take_along_axis(o, own[None, :, None, None, None], 3)
    return o.reshape(B, N, H)


def _call(scale, size, q, k_cache, v_cache, lengths):
    (B, S, K, H), (_, U, R, _) = k_cache.shape, q.shape

    def cache_block(b, j, lengths):
        last = jax.lax.div(jnp.maximum(lengths[b], 1) - 1, size)
        return b, jnp.minimum(j, last), 0

    row = pl.BlockSpec((1, U, R, LANES), lambda b, j, _: (b, 0, 0, 0))
    cache = pl.BlockSpec((1, size, K * H), cache_block)
    return pl.pallas_call(
        functools.partial(_kernel, scale * math.log2(math.e)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, -(-S // size)),
            in_specs=[row, cache, cache],
            out_specs=row,
            scratch_shapes=[
                pltpu.VMEM((U, R, 1), jnp.float32),  # m
                pltpu.VMEM((U, R, 1), jnp.float32),  # l
                pltpu.VMEM((U, R, LANES), jnp.float32),  # o
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        name="attention_step",
    )(lengths, q, k_cache.reshape(B, S, K * H), v_cache.reshape(B, S, K * H))


def _kernel(exponent, lengths, q, k, v, o, m, l, acc):
    j, size = pl.program_id(1), k.shape[1]
    left = lengths[pl.program_id(0)] - j * size  # entries from this block on

    @pl.when(j == 0)
    def _():
        m[...] = jnp.full_like(m, LOWEST)
        l[...] = jnp.zeros_like(l)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(left > 0)
    def _():
        seen = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) < left
        row = jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 0) < left
        for u in range(q.shape[1]):
            lanes = slice(u * LANES, min((u + 1) * LANES, k.shape[2]))
            width = lanes.stop - lanes.start
            logits = dot(q[0, u, :, :width], k[0, :, lanes], NT) * exponent
            logits = jnp.where(seen, logits, -jnp.inf)
            highest = jnp.maximum(m[u], logits.max(1, keepdims=True))
            weights = jnp.exp2(logits - highest)
            shrink = jnp.exp2(m[u] - highest)
            m[u] = highest
            l[u] = l[u] * shrink + weights.sum(1, keepdims=True)
            # What lies behind the length may be anything, also NaN.
            values = jnp.where(row[:, :width], v[0, :, lanes], 0)
            new = dot(weights.astype(v.dtype), values, NN)
            acc[u, :, :width] = acc[u, :, :width] * shrink + new

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        total = l[...]
        o[0] = (acc[...] / jnp.where(total > 0, total, 1)).astype(o.dtype)
