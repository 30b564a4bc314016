"""Forward of attention on TPU: logits of one block pair beside the softmax of the last one.

    s = k q^T    m = max s    p = exp2(c s - m)    l = sum p    o^T = v^T p      c = scale log2(e)

Everything is transposed, keys in rows and queries in lanes: maxima and sums run over registers and
not over lanes, what belongs to a query is a row that broadcasts for free, and the product with v
fills all columns of a 256-wide matrix unit though a head has 128 dims.

The compiler overlaps well only what does not depend on each other. So step g of the grid computes
the logits of visit g into scratch while it takes those of visit g - 1 out of it, piece by piece in
the same place, for the softmax and the product with v: the matrix unit never waits for the rest.

    B batch   K key heads   G query heads of a step's key head   H head dim   P visits
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import pallas_tpu_tiles as tiling
from pallas_kernels.attention.pallas_tpu_tiles import NN, NT, dot, piece
from pallas_kernels.attention.pallas_tpu_visits import BORDER, FIRST, LANES, visits

__all__ = ["forward_kernel"]

LOWEST = -1e30  # a maximum to start from, finite: exp2(-inf - LOWEST) is 0 and not NaN


def forward_kernel(params, tiles, q, k, v, q_ids, kv_ids, offset):
    """Return (o as q, lse [B,N,1,T] fp32) of tokens filled up to whole blocks.

    q, k and v are views of `tiling.view`.
    """
    table, count = visits(params, tiles, q_ids, kv_ids, offset, by_keys=False)
    B, P = table.shape
    call = tiling.Call(params, tiles, P)
    specs = [call.queries(0), call.keys(0), call.keys(1)]
    operands = [q, k, v]
    if q_ids is not None:
        specs += [call.query_ids(0), call.key_ids(0)]
        operands += call.ids(q_ids, kv_ids)
    G, H, (rows, columns) = call.group, params.shape_q[3], (tiles.rows, tiles.columns)
    padded = tiles.rows * tiles.counts[0]
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, params.shape_q[2] // G, P * G + 1),
            in_specs=specs,
            out_specs=[call.outputs(1), call.output_rows(1)],
            scratch_shapes=[
                pltpu.VMEM((columns, LANES), jnp.int32),  # ids of the keys
                pltpu.VMEM((columns, rows), jnp.float32),  # logits
                pltpu.VMEM((8, rows), jnp.float32),  # maxima of every 8th key
                pltpu.VMEM((G, 1, rows), jnp.float32),  # m
                pltpu.VMEM((G, 8, rows), jnp.float32),  # l, of every 8th key
                pltpu.VMEM((G, H, rows), jnp.float32),  # o^T
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, params.shape_q[2], 1, padded), jnp.float32),
        ],
        compiler_params=call.compiler_params(),
        name="attention_fwd",
    )(table.reshape(-1), count, call.offsets(offset), *operands)


def _kernel(call, table, count, offset, *refs):
    q, k, v, *ids, o, lse, key_ids, logits, top, m, l, acc = refs
    step = call.step(table, count)
    head = step.head(1)
    state = (logits, top, m.at[head], l.at[head], acc.at[head])
    run = functools.partial(_overlapped, call, step.visit(1) & FIRST != 0, q, k, v, state)

    @pl.when(step.running)
    def _():
        border = step.visit(0) & BORDER != 0
        pl.when(~border)(run)

        @pl.when(border)
        def _():
            if ids:
                # The heads of a group have them in common.
                pl.when(step.head(0) == 0)(lambda: call.key_columns(ids[1], key_ids))
            of_pair = [ids[0], key_ids] if ids else []
            run(functools.partial(call.seen, step.visit(0), offset[step.b], of_pair))

        @pl.when(step.finishes(1))
        def _():
            total = l[head].sum(0, keepdims=True)
            seen = total > 0
            inverse = jnp.where(seen, 1 / jnp.where(seen, total, 1), 0)
            o[0] = (acc[head] * inverse).T.astype(o.dtype)
            value = (m[head] + jnp.log2(jnp.where(seen, total, 1))) * math.log(2)
            lse[0, 0] = jnp.where(seen, value, jnp.inf)


def _overlapped(call, first, q, k, v, state, mask=None):
    """Take the last visit's logits through the softmax and put this one's in their place.

    `first` says that the last visit was the first of its queries, `mask` what this one sees. With
    a mask the body is a loop over queries, to be less code.
    """
    tiles, v_t, (logits, top, m, l, acc) = call.tiles, v[0].T, state
    across, down = piece(tiles.rows), piece(tiles.columns)

    def part(i):
        lanes = pl.ds(i, across)
        before = jnp.where(first, LOWEST, m[:, lanes])
        highest = top[:, lanes].max(0, keepdims=True) * call.exponent
        highest = jnp.maximum(before, highest)
        m[:, lanes] = highest
        shrink = jnp.exp2(before - highest)
        total, product, maxima = jnp.where(first, 0, l[:, lanes] * shrink), None, None
        for j in range(0, tiles.columns, down):
            keys = slice(j, j + down)
            weights = jnp.exp2(logits[keys, lanes] * call.exponent - highest)
            total += weights.reshape(-1, 8, across).sum(0)
            fresh = dot(k[0, keys], q[0, lanes], NT)
            if mask is not None:
                fresh = jnp.where(mask((j, down), (i, across)), fresh, -jnp.inf)
            logits[keys, lanes] = fresh
            fresh = fresh.reshape(-1, 8, across).max(0)
            maxima = fresh if maxima is None else jnp.maximum(maxima, fresh)
            fresh = dot(v_t[:, keys], weights.astype(v.dtype), NN)
            product = fresh if product is None else product + fresh
        l[:, lanes] = total
        top[:, lanes] = maxima
        acc[:, lanes] = jnp.where(first, 0, acc[:, lanes] * shrink) + product

    if mask is None:
        for i in range(0, tiles.rows, across):
            part(i)
    else:
        pl.loop(0, tiles.rows // across)(lambda n: part(pl.multiple_of(n * across, across)))
