"""The parallel half of the gated delta rule's backward on Hopper: one block per chunk and head.

From the states S, the inverse X and what the sweep leaves, dS+ and dR~ (letters of the README):

    R   = V - a K S                     V'  = X (beta R)             P = s tril(Q K^T * D)
    dP  = tril(dO V'^T)                 dA  = -tril(dR~ V'^T, -1)    B = tril(K K^T * D, -1)
    dQ1 = s a dO S^T                    dQ  = dQ1 + (s dP * D) K
    dK1 = z V' dS+^T                    dK2 = -a beta dR~ S^T        Y = beta (dA * D)
    dK  = dK1 + dK2 + (s dP * D)^T Q + (Y + Y^T) K                   dV = beta dR~
    E   = dP * P + beta dA * B          dbeta = rowsum(dR~ * R) + rowsum(dA * B)

A warpgroup takes 64 columns of everything as wide as a head; of the [C,C] products the first one
takes dP's, the last one dA's.

    B batch   Z chunks   C = 64 rows of a chunk   K key heads   R value heads
    H key dim = E value dim   W warpgroups, H / 64
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import BETA, CUMULATIVE, READ, RUN, WRITE
from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import (
    TILE,
    decay,
    indices,
    load,
    load_row,
    matrix,
    products,
)

# The sums: rowsum(E) + rowsum(Q * dQ1) + rowsum(K * dK2), colsum(E), rowsum(K * dK1), dbeta, all
# by rows of the chunk, and <S, dS+> by rows of S.
OF_ROWS, OF_COLUMNS, WRITTEN, DBETA, KEPT = range(5)


def gradients(scale, q, k, v, do, gates, t_inv, states, dstates, dr):
    """Return dq, dk, dv [B,Z*C,R,H] and fp32 sums [Z,B,R,W,5,C], each to be summed over W.

    Arguments as the sweep takes and leaves them; dq and dk are per value head.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    H, dtype = q.shape[3], q.dtype
    W, groups = H // TILE, R // q.shape[2]

    def body(q, k, v, do, gates, t_inv, states, dstates, dr, dq, dk, dv, sums, *scratch):
        read_s, (dqk_s, y_s, all_sums_s), (full, met) = scratch
        q_s, k_s, v_s, do_s, gates_s, t_s, s_s, ds_s, dr_s = read_s
        z, b, r, w = (jax.lax.axis_index(n) for n in ("chunk", "batch", "head", "columns"))
        own, sums_s = pl.ds(w * TILE, TILE), all_sums_s.at[w]
        at, of_head = (b, pl.ds(z * C, C), r), (z, b, r)
        at_key = (b, pl.ds(z * C, C), jax.lax.div(r, jnp.int32(groups)))

        @pl.when(w == 0)
        def _():
            sources = [q.at[at_key], k.at[at_key], v.at[at], do.at[at]]
            sources += [x.at[of_head] for x in (gates, t_inv, states, dstates, dr)]
            for source, target in zip(sources, read_s, strict=True):
                plgpu.copy_gmem_to_smem(source, target, full)

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def correct():
            """Replace V by V' and return rowsum(dR~ * R)."""
            (k_state,) = products([(k_s, s_s.at[:, own])])
            rest = load(v_s.at[:, own]) - load_row(gates_s.at[READ]) * k_state
            v_s[:, own] = (load_row(gates_s.at[BETA]) * rest).astype(dtype)
            plgpu.commit_smem()
            (v_new,) = products([(t_s, v_s.at[:, own])])
            v_s[:, own] = v_new.astype(dtype)
            return jnp.sum(load(dr_s.at[:, own]) * rest, axis=1)

        def query_pairs():
            """Store s dP * D, return dP * P."""
            dp, scores = products([(do_s, v_s.T)], [(q_s, k_s.T)])
            dqk = scale * dp * decay(gates_s.at[CUMULATIVE], gates_s.at[RUN])
            dqk_s[...] = dqk.astype(dtype)
            return dqk * scores

        def key_pairs():
            """Store Y, return dA * A and rowsum(dA * B)."""
            dr_v, pairs = products([(dr_s, v_s.T)], [(k_s, k_s.T)])
            i, j = indices()
            da = -decay(gates_s.at[CUMULATIVE], gates_s.at[RUN]) * dr_v
            da = jnp.where(i > j, da, 0.0)
            y = load_row(gates_s.at[BETA]) * da
            y_s[...] = y.astype(dtype)
            return y * pairs, jnp.sum(da * pairs, axis=1)

        def add_pairs(e, dbeta):
            sums_s[OF_ROWS] = jnp.sum(e, axis=1)
            sums_s[OF_COLUMNS] = jnp.sum(e, axis=0)
            sums_s[DBETA] = dbeta

        def all_pairs(dbeta):
            if W == 1:
                e, of_pairs = key_pairs()
                add_pairs(query_pairs() + e, dbeta + of_pairs)
                return

            @pl.when(w == 0)
            def _():
                add_pairs(query_pairs(), dbeta)

            @pl.when(w == W - 1)
            def _():
                e, of_pairs = key_pairs()
                add_pairs(e, dbeta + of_pairs)

        def of_queries():
            """Return dQ and rowsum(Q * dQ1)."""
            do_state, pairs = products([(do_s, s_s.at[own].T)], [(dqk_s, k_s.at[:, own])])
            state = scale * load_row(gates_s.at[READ]) * do_state
            return (state + pairs).astype(dtype), jnp.sum(load(q_s.at[:, own]) * state, axis=1)

        def of_keys():
            """Return dK and rowsum(K * dK2); store rowsum(K * dK1)."""
            dr_state, v_dstate = products([(dr_s, s_s.at[own].T)], [(v_s, ds_s.at[:, own])])
            read = -load_row(gates_s.at[READ]) * load_row(gates_s.at[BETA]) * dr_state
            write = load_row(gates_s.at[WRITE]) * v_dstate
            k_own = load(k_s.at[:, own])
            sums_s[WRITTEN] = jnp.sum(k_own * write, axis=1)
            of_rows = jnp.sum(k_own * read, axis=1)
            k_own = k_s.at[:, own]
            (pairs,) = products([(dqk_s.T, q_s.at[:, own]), (y_s, k_own), (y_s.T, k_own)])
            return (read + write + pairs).astype(dtype), of_rows

        plgpu.barrier_wait(full)
        dbeta = correct()
        meet()
        all_pairs(dbeta)
        parts = [pl.ds(i * TILE, TILE) for i in range(W)]
        kept = [load(s_s.at[own, part]) * load(ds_s.at[part, own].T) for part in parts]
        sums_s[KEPT] = jnp.sum(functools.reduce(jnp.add, kept), axis=1)
        meet()
        dq_own, of_queries_rows = of_queries()
        dk_own, of_keys_rows = of_keys()
        of_pairs = plgpu.load(sums_s.at[OF_ROWS], layout=plgpu.Layout.WGMMA.reduce(1))
        sums_s[OF_ROWS] = of_pairs + of_queries_rows + of_keys_rows
        meet()  # all have read what the results overwrite
        v_s[:, own] = (load_row(gates_s.at[BETA]) * load(dr_s.at[:, own])).astype(dtype)
        do_s[:, own] = dq_own
        k_s[:, own] = dk_own
        meet()

        @pl.when(w == 0)
        def _():
            for result, target in ((do_s, dq), (k_s, dk), (v_s, dv)):
                plgpu.copy_smem_to_gmem(result, target.at[at])
            plgpu.copy_smem_to_gmem(all_sums_s, sums.at[of_head])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        body,
        out_type=(
            *[jax.ShapeDtypeStruct((B, Z * C, R, H), dtype)] * 3,
            jax.ShapeDtypeStruct((Z, B, R, W, 5, C), jnp.float32),
        ),
        scratch_types=[
            [
                *[matrix(dtype, C, H)] * 4,
                plgpu.SMEM((rows, C), jnp.float32),
                matrix(dtype, C, C),
                *[matrix(dtype, H, H)] * 2,
                matrix(dtype, C, H),
            ],
            [matrix(dtype, C, C), matrix(dtype, C, C), plgpu.SMEM((W, 5, C), jnp.float32)],
            [plgpu.Barrier(num_arrivals=9), plgpu.Barrier(num_arrivals=W)],
        ],
        grid=(R, Z, B),
        grid_names=("head", "chunk", "batch"),
        num_threads=W,
        thread_name="columns",
        kernel_name="gdn_gradients",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, v, do, gates, t_inv, states, dstates, dr)
