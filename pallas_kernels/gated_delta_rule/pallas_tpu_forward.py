"""The forward of the gated delta rule on TPU in one kernel that walks over the chunks.

    N = -tril(K K^T * D, -1) b    X = (I - N)^-1     P = tril(Q K^T * D) b     (b scales columns)
    R = V - a K S                 U = X R            O = s (a Q S + P U)
    S+ = y S + K^T (z b U)

V' = b U is never made: with beta on the right of A its inverse is that of the README up to a
scaling, X_README b = b X, and every gate but c and a scales columns, for which nothing has to cross
lanes. The state is fp32 in VMEM.

    B batch   T tokens   K key heads   R value heads   J blocks of N value heads   Z chunks
    C rows of a chunk   H key dim   E value dim
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.pallas_tpu_blocks import (
    BETA,
    COLUMN_READ,
    KEEP,
    WRITE,
    Blocks,
    Gates,
)
from pallas_kernels.gated_delta_rule.pallas_tpu_inverse import (
    inverse_scratch,
    unit_lower_inverses,
)
from pallas_kernels.gated_delta_rule.pallas_tpu_tiles import Step, dot, head, store_head

NAME = "gdn_forward"


def forward_kernel(blocks: Blocks, scale: float, residuals: bool, q, k, v, gates: Gates, state):
    """q, k [B,T,K H], v [B,T,R E], state [B,R,H,E] -> (o [B,T,R E], state, X, chunk states).

    X is [Z,B,R,C,C] and the states at the chunk starts are [Z,B,R,H,E], both in q's dtype; they are
    left out unless `residuals`.
    """
    B, Z, C, R = blocks.batch, blocks.chunks, blocks.chunk, blocks.value_heads
    H, E = blocks.key_dim, blocks.value_dim
    out_shapes = [
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct(state.shape, state.dtype),
    ]
    out_specs = [blocks.of_values(), blocks.of_state()]
    if residuals:
        out_shapes += [jax.ShapeDtypeStruct((Z, B, R, *tile), q.dtype) for tile in ((C, C), (H, E))]
        out_specs += [blocks.of_chunk(C, C), blocks.of_chunk(H, E)]
    operands = (q, k, v, gates.columns, gates.rows, *gates.runs, state)
    return pl.pallas_call(
        functools.partial(_kernel, blocks, scale, len(gates.runs)),
        grid=blocks.grid,
        in_specs=[
            blocks.of_keys(),
            blocks.of_keys(),
            blocks.of_values(),
            blocks.of_columns(),
            blocks.of_rows(4, C),
            *blocks.of_runs()[: len(gates.runs)],
            blocks.of_state(),
        ],
        out_specs=out_specs,
        out_shape=out_shapes,
        scratch_shapes=[*blocks.scratch(), inverse_scratch(C)],
        compiler_params=blocks.compiler_params(q.dtype),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * Z * C * R * (2 * C * H + 2 * C * E + 3 * H * E),
            transcendentals=B * Z * C * R * C,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *out_shapes)),
        ),
        name=NAME,
    )(*operands)


def _kernel(blocks: Blocks, scale: float, runs: int, q, k, v, columns, rows, *refs):
    run_refs, (initial, o, final), rest = refs[:runs], refs[runs : runs + 3], refs[runs + 3 :]
    *residuals, state, mask, scratch = rest
    step, C, dtype = Step(blocks, q, k, columns, rows, mask), blocks.chunk, q.dtype

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[0]

    step.fill_mask(run_refs)
    negated, p = [], []  # both with -beta, which only P has to take back
    for h, products in enumerate(step.products()):
        pairs = step.decays(h) * step.row(BETA, h)
        negated.append(products[:C] * pairs)
        p.append((products[C:] * pairs).astype(dtype))
    r, from_state = [], []  # before the inverse: their products run beside its first blocks
    for h in step.heads:
        s = state[h].astype(dtype)
        a, read = step.column(COLUMN_READ, h), dot(step.keys_and_queries(h), s)
        values = head(v, h, blocks.value_dim).astype(jnp.float32)
        r.append((values - a * read[:C]).astype(dtype))
        from_state.append(a * read[C:])
        if residuals:
            residuals[1][0, 0, h] = s
    x = unit_lower_inverses(negated, scratch, exact=dtype == jnp.float32)
    x = [a.astype(dtype) for a in x]
    if residuals:
        for h in step.heads:
            residuals[0][0, 0, h] = x[h]
    u = [dot(x[h], r[h]).astype(dtype) for h in step.heads]
    for h in step.heads:
        store_head(o, h, scale * (from_state[h] - dot(p[h], u[h])))
    for h in step.heads:
        keys_t = step.keys(h).T.astype(jnp.float32) * step.row(WRITE, h)
        keep = step.row(KEEP, h)[:, :1]
        state[h] = keep * state[h] + dot(keys_t.astype(dtype), u[h])

    @pl.when(pl.program_id(2) == blocks.chunks - 1)
    def _():
        final[0] = state[...]
