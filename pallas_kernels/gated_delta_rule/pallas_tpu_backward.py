"""The backward of the gated delta rule on TPU in one kernel that walks back over the chunks.

With the letters of `pallas_tpu_forward` (b scales columns, as a right factor), given dO and dS+ of
a chunk, and S and X from the forward:

    dU = s P^T dO + z b K dS+         dR = X^T dU = dV
    W  = s dO U^T * D b               Y  = -dR U^T * D b, below the diagonal
    F  = [-a dR; s a dO]              dS = y dS+ + [K; Q]^T F              to the chunk before
    [dK1; dQ1] = F S^T                dK2 = (z b U) dS+^T
    dQ = dQ1 + W K                    dK = dK1 + dK2 + W^T Q + (Y + Y^T) K
    e  = (s dO U^T * Q K^T - dR U^T * K K^T) * D

Gradients of the gates are sums over rows and columns of what is at hand, finished outside:

    i0 = rowsum(e b) + rowsum(Q * dQ1 + K * dK1)     i1 = colsum(e)     i2 = rowsum(U * K dS+)
    dbeta = i1 + z i2         dc = i0 - b i1 - z b i2         dc_C += sum(z b i2) + y <S, dS+>

    B batch   T tokens   K key heads   R value heads   J blocks of N value heads   Z chunks
    C rows of a chunk   H key dim   E value dim
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.pallas_tpu_blocks import (
    BETA,
    COLUMN_READ,
    COLUMN_WRITE,
    KEEP,
    Blocks,
    Gates,
)
from pallas_kernels.gated_delta_rule.pallas_tpu_tiles import (
    NT,
    TN,
    Step,
    dot,
    head,
    lanes,
    split,
    store_head,
)

NAME = "gdn_backward"
READ, COLUMN, WRITTEN = range(3)  # sums i0, i1, i2


def backward_kernel(blocks: Blocks, scale: float, q, k, v, gates: Gates, x, states, do, dstate):
    """Return (dq, dk [B,T,J M H], dv, sums [B,J,Z,3,N,C], kept [B,J,Z,1,N,E], initial dstate).

    Shapes of what is given are those of `forward_kernel`. dq and dk hold what each block of value
    heads adds to its key heads; sums are i0, i1, i2, and kept the sum of S * dS+ over H.
    """
    B, T, _ = q.shape
    J, Z, N, C = blocks.count, blocks.chunks, blocks.heads, blocks.chunk
    H, E = blocks.key_dim, blocks.value_dim
    key_sums = jax.ShapeDtypeStruct((B, T, J * blocks.keys * H), q.dtype)
    out_shapes = [
        key_sums,
        key_sums,
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct((B, J, Z, 3, N, C), jnp.float32),
        jax.ShapeDtypeStruct((B, J, Z, 1, N, E), jnp.float32),
        jax.ShapeDtypeStruct(dstate.shape, dstate.dtype),
    ]
    operands = (q, k, v, do, gates.columns, gates.rows, *gates.runs, x, states, dstate)
    return pl.pallas_call(
        functools.partial(_kernel, blocks, scale, len(gates.runs)),
        grid=blocks.grid,
        in_specs=[
            blocks.of_keys(),
            blocks.of_keys(),
            blocks.of_values(),
            blocks.of_values(),
            blocks.of_columns(),
            blocks.of_rows(4, C),
            *blocks.of_runs()[: len(gates.runs)],
            blocks.of_chunk(C, C),
            blocks.of_chunk(H, E),
            blocks.of_state(),
        ],
        out_specs=[
            blocks.of_key_sums(),
            blocks.of_key_sums(),
            blocks.of_values(),
            blocks.of_rows(3, C),
            blocks.of_rows(1, E),
            blocks.of_state(),
        ],
        out_shape=out_shapes,
        scratch_shapes=blocks.scratch(),
        compiler_params=blocks.compiler_params(q.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * Z * C * blocks.value_heads * (6 * C * H + 5 * C * E + 7 * H * E),
            transcendentals=B * Z * C * blocks.value_heads * C,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *out_shapes)),
        ),
        name=NAME,
    )(*operands)


def _kernel(blocks: Blocks, scale: float, runs: int, q, k, v, do, columns, rows, *refs):
    run_refs, (x, states, final), refs = refs[:runs], refs[runs : runs + 3], refs[runs + 3 :]
    dq, dk, dv, sums, kept, initial, dstate, mask = refs
    step, dtype = Step(blocks, q, k, columns, rows, mask), q.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = final[0]

    step.fill_mask(run_refs)
    s = [states[0, 0, h] for h in step.heads]
    ds = [dstate[h].astype(dtype) for h in step.heads]
    pairs = _pairs(step, scale)
    u = _values(step, v, x, s)
    du, written = _value_gradients(step, pairs, do, u, ds)
    for h in step.heads:
        product = s[h].astype(jnp.float32) * dstate[h]
        kept[0, 0, 0, 0, h : h + 1, :] = jnp.sum(product, 0, keepdims=True)
    dr = [dot(x[0, 0, h], du[h].astype(dtype), TN) for h in step.heads]
    for h in step.heads:
        sums[0, 0, 0, WRITTEN, h : h + 1, :] = _row_sums(written[h], dtype)
        store_head(dv, h, dr[h])
    dpairs, weighted = _pair_gradients(step, scale, pairs, do, u, dr, sums)
    f = _to_state(step, scale, do, dr)
    read = _key_gradients(step, f, s, ds, u, dpairs, dq, dk)
    for h in step.heads:
        tiles = [weighted[h], read[h]]
        if blocks.chunk == blocks.key_dim:
            tiles = [weighted[h] + read[h]]
        sums[0, 0, 0, READ, h : h + 1, :] = sum(_row_sums(tile, dtype) for tile in tiles)
    for h in step.heads:
        keep = step.row(KEEP, h)[:, :1]
        dstate[h] = keep * dstate[h] + dot(step.keys_and_queries(h), f[h], TN)

    @pl.when(pl.program_id(2) == blocks.chunks - 1)
    def _():
        initial[0] = dstate[...]


class _Pairs(NamedTuple):
    """Gates and products of the pairs of one head, all [C, C]."""

    decay: Array  # D
    of_keys: Array  # K K^T * D, below the diagonal
    of_queries: Array  # Q K^T * D
    p: Array  # s P


def _pairs(step: Step, scale: float) -> list[_Pairs]:
    pairs, C = [], step.blocks.chunk
    for h, products in enumerate(step.products()):
        decay = step.decays(h)
        of_keys = jnp.where(_below(C), products[:C] * decay, 0.0)
        of_queries = products[C:] * decay
        p = (of_queries * (-scale * step.row(BETA, h))).astype(step.k.dtype)
        pairs.append(_Pairs(decay, of_keys, of_queries, p))
    return pairs


def _values(step: Step, v, x, s: list) -> list:
    """U, computed again."""
    r = []
    for h in step.heads:
        read = step.column(COLUMN_READ, h) * dot(step.keys(h), s[h])
        r.append((head(v, h, step.blocks.value_dim).astype(jnp.float32) - read).astype(v.dtype))
    return [dot(x[0, 0, h], r[h]).astype(v.dtype) for h in step.heads]


def _value_gradients(step: Step, pairs: list[_Pairs], do, u: list, ds: list) -> tuple[list, list]:
    """dU, and U * K dS+ whose row sums are i2."""
    du, written = [], []
    for h in step.heads:
        of_state = dot(step.keys(h), ds[h])
        of_output = dot(pairs[h].p, head(do, h, step.blocks.value_dim), TN)
        du.append(of_output + step.column(COLUMN_WRITE, h) * of_state)
        written.append(u[h].astype(jnp.float32) * of_state)
    return du, written


def _pair_gradients(step: Step, scale: float, pairs: list[_Pairs], do, u, dr, sums) -> tuple:
    """[Y; W] [2C, C], and e b; i1 on the way."""
    dpairs, weighted, C, dtype = [], [], step.blocks.chunk, do.dtype
    for h in step.heads:
        both = jnp.concatenate([dr[h].astype(dtype), head(do, h, step.blocks.value_dim)])
        both = dot(both, u[h], NT)
        of_r, of_o = both[:C], both[C:]
        e = scale * (of_o * pairs[h].of_queries) - of_r * pairs[h].of_keys
        sums[0, 0, 0, COLUMN, h : h + 1, :] = jnp.sum(e, 0, keepdims=True)
        beta = step.row(BETA, h)  # negative
        weighted.append(e * -beta)
        y = jnp.where(_below(C), of_r * pairs[h].decay, 0.0) * beta
        w = of_o * pairs[h].decay * (-scale * beta)
        dpairs.append(jnp.concatenate([y, w]).astype(dtype))
    return dpairs, weighted


def _to_state(step: Step, scale: float, do, dr: list) -> list:
    """F = [-a dR; s a dO] [2C, E]"""
    f = []
    for h in step.heads:
        a = step.column(COLUMN_READ, h)
        of_output = scale * a * head(do, h, step.blocks.value_dim).astype(jnp.float32)
        f.append(jnp.concatenate([-a * dr[h], of_output]).astype(do.dtype))
    return f


def _key_gradients(step: Step, f, s, ds, u, dpairs, dq, dk) -> list:
    """Store dQ and dK, added over the value heads of a key head; return Q * dQ1 + K * dK1."""
    C, dtype = step.blocks.chunk, dq.dtype
    totals, read = {}, []
    for h in step.heads:
        of_state = dot(f[h], s[h], NT)
        product = step.keys_and_queries(h).astype(jnp.float32) * of_state
        read.append(product[:C] + product[C:])
        both = of_state + dot(dpairs[h], step.keys(h))  # of keys, of queries
        writes = (step.column(COLUMN_WRITE, h) * u[h].astype(jnp.float32)).astype(dtype)
        of_keys = both[:C] + dot(writes, ds[h], NT)
        of_keys = of_keys + dot(dpairs[h], step.keys_and_queries(h), TN)
        totals.setdefault(step.blocks.key_of(h), []).append((of_keys, both[C:]))
    for m, parts in totals.items():
        of_keys, of_queries = (functools.reduce(operator.add, x) for x in zip(*parts, strict=True))
        store_head(dk, m, of_keys)
        store_head(dq, m, of_queries)
    return read


def _below(size: int):
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), 0) > lanes((size, size))


def _row_sums(x, dtype):
    """Sums over the columns, as a row [1, C]: a product with ones also turns the column over."""
    parts = split(x, exact=dtype == jnp.float32)
    ones = jnp.ones((8, x.shape[1]), parts[0].dtype)
    return sum(dot(ones, part, NT) for part in parts)[:1]
