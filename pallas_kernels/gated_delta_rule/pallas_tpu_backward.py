"""The backward of the gated delta rule on TPU in one kernel that walks back over the chunks.

With the letters of `pallas_tpu_forward` (b scales columns, as a right factor), given dO and dS+ of a
chunk, and S and X from the forward:

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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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
    column,
    decays,
    dot,
    head,
    lanes,
    row,
    split,
    store_pair_mask,
)

NAME = "gdn_backward"


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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * Z * C * blocks.value_heads * (6 * C * H + 5 * C * E + 6 * H * E),
            transcendentals=B * Z * C * blocks.value_heads * C,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *out_shapes)),
        ),
        name=NAME,
    )(*operands)


LOCK = 8


def _kernel(blocks: Blocks, scale: float, runs: int, q, k, v, do, columns, rows, *refs):
    run_refs, (x, states, final), refs = refs[:runs], refs[runs : runs + 3], refs[runs + 3 :]
    dq, dk, dv, sums, kept, initial, dstate, mask = refs
    H, E, C, dtype = blocks.key_dim, blocks.value_dim, blocks.chunk, q.dtype
    exact = dtype == jnp.float32

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = final[0]

    store_pair_mask(mask, run_refs)
    below = jax.lax.broadcasted_iota(jnp.int32, (C, C), 0) > lanes((C, C))
    grads = {}
    for first in range(0, blocks.heads, LOCK):
        heads = range(first, min(first + LOCK, blocks.heads))
        stacked, products = {}, {}
        for m in sorted({blocks.key_of(h) for h in heads}):
            keys = head(k, m, H)
            stacked[m] = jnp.concatenate([keys, head(q, m, H)])
            products[m] = dot(stacked[m], keys, NT)
        d, of_k, of_q, p = {}, {}, {}, {}
        for h in heads:
            d[h] = decays(columns, rows, mask, h)
            of_k[h] = jnp.where(below, products[blocks.key_of(h)][:C] * d[h], 0.0)
            of_q[h] = products[blocks.key_of(h)][C:] * d[h]
            p[h] = (of_q[h] * (-scale * row(rows, BETA, h))).astype(dtype)
        s, ds, u, du = {}, {}, {}, {}
        for h in heads:
            keys = head(k, blocks.key_of(h), H)
            s[h] = states[0, 0, h]
            a = column(columns, COLUMN_READ, h)
            r = head(v, h, E).astype(jnp.float32) - a * dot(keys, s[h])
            u[h] = dot(x[0, 0, h], r.astype(dtype))
        for h in heads:
            keys = head(k, blocks.key_of(h), H)
            ds[h] = dstate[h].astype(dtype)
            kds = dot(keys, ds[h])
            du[h] = dot(p[h], head(do, h, E), TN) + column(columns, COLUMN_WRITE, h) * kds
            sums[0, 0, 0, 2, h : h + 1, :] = _row_sums(u[h] * kds, exact)
            product = s[h].astype(jnp.float32) * dstate[h]
            kept[0, 0, 0, 0, h : h + 1, :] = jnp.sum(product, 0, keepdims=True)
        dr = {h: dot(x[0, 0, h], du[h].astype(dtype), TN) for h in heads}
        pair = {}
        for h in heads:
            dr_ = dr[h].astype(dtype)
            dv[0, :, h * E : (h + 1) * E] = dr_
            du_pairs = dot(jnp.concatenate([dr_, head(do, h, E)]), u[h].astype(dtype), NT)
            of_r, of_o = du_pairs[:C], du_pairs[C:]
            e = scale * (of_o * of_q[h]) - of_r * of_k[h]
            sums[0, 0, 0, 1, h : h + 1, :] = jnp.sum(e, 0, keepdims=True)
            beta = row(rows, BETA, h)
            sums[0, 0, 0, 0, h : h + 1, :] = _row_sums(e * -beta, exact)
            y = jnp.where(below, of_r * d[h], 0.0) * beta
            w = of_o * d[h] * (-scale * beta)
            pair[h] = jnp.concatenate([y, w]).astype(dtype)
        for h in heads:
            m = blocks.key_of(h)
            keys = head(k, m, H)
            a = column(columns, COLUMN_READ, h)
            f = jnp.concatenate([-a * dr[h], (scale * a) * head(do, h, E).astype(jnp.float32)])
            f = f.astype(dtype)
            keep = row(rows, KEEP, h)[:, :1]
            from_state = dot(f, s[h], NT)
            sk = stacked[m].astype(jnp.float32) * from_state
            at = (0, 0, 0, 0, slice(h, h + 1))
            sums[at] = sums[at] + _row_sums(sk[:C] + sk[C:], exact)
            total = from_state + dot(pair[h], keys)
            written = (column(columns, COLUMN_WRITE, h) * u[h]).astype(dtype)
            dkey = total[:C] + dot(written, ds[h], NT) + dot(pair[h], stacked[m], TN)
            dstate[h] = keep * dstate[h] + dot(stacked[m], f, TN)
            grads[m] = (
                (dkey, total[C:])
                if m not in grads
                else (grads[m][0] + dkey, grads[m][1] + total[C:])
            )
    for m, (dkey, dquery) in grads.items():
        dk[0, :, m * H : (m + 1) * H] = dkey.astype(dtype)
        dq[0, :, m * H : (m + 1) * H] = dquery.astype(dtype)

    @pl.when(pl.program_id(2) == blocks.chunks - 1)
    def _():
        initial[0] = dstate[...]


def _row_sums(x, exact: bool):
    """Sums over the columns, as a row [1, C]: a product with ones also turns the column over."""
    ones = jnp.ones((8, x.shape[1]), x.dtype if exact else jnp.bfloat16)
    return sum(dot(ones, part, NT) for part in split(x, exact))[:1]
