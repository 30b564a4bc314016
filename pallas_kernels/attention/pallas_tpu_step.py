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

from pallas_kernels.attention import step
from pallas_kernels.attention.pallas_tpu import HEAD_DIMS, NAME
from pallas_kernels.attention.pallas_tpu_tiles import NN, NT, dot
from pallas_kernels.attention.pallas_tpu_visits import LANES
from pallas_kernels.dispatch import decline

__all__ = ["apply", "block", "check"]

BLOCK = 2048  # cache entries at most
WINDOW = (
    2**20
)  # bytes of the keys of a block at most: then their fetch takes longer than a step's rest
VMEM = 32 * 2**20
LOWEST = -1e30  # a maximum to start from, finite: exp2(-inf - LOWEST) is 0 and not NaN


def check(params) -> None:
    """Decline what the kernel is not written for."""
    if params.dtype not in (jnp.bfloat16, jnp.float32):
        raise decline(NAME, "takes bfloat16 or float32", params.dtype)
    if params.shape_k[3] not in HEAD_DIMS:
        raise decline(NAME, f"needs a head dim in {HEAD_DIMS}", params.shape_k[3])


def block(params) -> int:
    """Cache entries of a block."""
    _, S, K, H = params.shape_k
    size = max(WINDOW // (K * H * params.dtype.itemsize) // LANES, 1) * LANES
    return min(size, BLOCK, -(-S // LANES) * LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(params, q, k_cache, v_cache, lengths):
    """Return o [B,N,H]; a row of length 0 gives 0."""
    (B, _, K, H), N = k_cache.shape, q.shape[1]
    lengths = lengths.astype(jnp.int32)
    side = LANES // H  # key heads side by side
    units, own = -(-K // side), jnp.arange(K) % side
    lanes = jax.nn.one_hot(own, side, dtype=q.dtype)
    q_BKGSH = q.reshape(B, K, N // K, 1, H) * lanes[None, :, None, :, None]
    q_BURL = jnp.pad(q_BKGSH, ((0, 0), (0, units * side - K), *((0, 0),) * 3))
    q_BURL = q_BURL.reshape(B, units, side * N // K, LANES)
    o = _call(params.scale, block(params), q_BURL, k_cache, v_cache, lengths)
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

    def block(partial: bool):
        # Stage by stage, not unit by unit: the units' chains of steps then run side by side.
        slices = [slice(x, min(x + LANES, k.shape[2])) for x in range(0, k.shape[2], LANES)]
        keys, values = ([ref[0, :, lanes] for lanes in slices] for ref in (k, v))
        logits = [dot(q[0, u, :, : x.shape[1]], x, NT) * exponent for u, x in enumerate(keys)]
        if partial:
            seen = jax.lax.broadcasted_iota(jnp.int32, (1, size), 1) < left
            logits = [jnp.where(seen, x, -jnp.inf) for x in logits]
            # What lies behind the length may be anything, also NaN.
            values = [jnp.where(_row(x) < left, x, 0) for x in values]
        highest = [jnp.maximum(m[u], x.max(1, keepdims=True)) for u, x in enumerate(logits)]
        weights = [jnp.exp2(x - top) for x, top in zip(logits, highest, strict=True)]
        products = [dot(x.astype(v.dtype), y, NN) for x, y in zip(weights, values, strict=True)]
        for u, (top, x, product) in enumerate(zip(highest, weights, products, strict=True)):
            shrink = jnp.exp2(m[u] - top)
            m[u] = top
            l[u] = l[u] * shrink + x.sum(1, keepdims=True)
            width = product.shape[1]
            acc[u, :, :width] = acc[u, :, :width] * shrink + product

    pl.when(left >= size)(lambda: block(partial=False))
    pl.when((left > 0) & (left < size))(lambda: block(partial=True))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        total = l[...]
        o[0] = (acc[...] / jnp.where(total > 0, total, 1)).astype(o.dtype)


def _row(x):
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)


def _forward(params, *operands):
    return apply(params, *operands), operands


def _backward(params, operands, cotangent):
    return jax.vjp(functools.partial(step.apply, params), *operands)[1](cotangent)


apply.defvjp(_forward, _backward)
