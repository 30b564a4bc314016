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

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import (
    TILE,
    by_row,
    indices,
    load,
    load_column,
    load_row,
    products,
    tiles,
)

SUMS = 5


def gradients(scale, q, k, v, do, gates, t_inv, states, dstates, dr):
    """Return dq, dk, dv [B,Z*C,R,H] and fp32 sums [Z,B,R,W,5,C], each to be summed over W.

    Arguments as in the sweep; dq and dk are per value head. The sums are, by rows of the chunk,
    rowsum(E) + rowsum(Q * dQ1) + rowsum(K * dK2), colsum(E), rowsum(K * dK1) and dbeta; the last
    one is <S, dS+> by rows of S.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    H, W, dtype = q.shape[3], q.shape[3] // TILE, q.dtype
    groups = R // q.shape[2]

    def body(q, k, v, do, gates, t_inv, states, dstates, dr, *refs):
        dq, dk, dv, sums, *scratch = refs
        q_s, k_s, v_s, do_s, dr_s, s_s, ds_s, t_s, dqk_s, y_s, gates_s, sums_s, *sync = scratch
        full, met = sync
        z, b, r, w = (jax.lax.axis_index(n) for n in ("chunk", "batch", "head", "columns"))
        key_head = jax.lax.div(r, jnp.int32(groups))
        tokens, parts = pl.ds(z * C, C), [pl.ds(i * TILE, TILE) for i in range(W)]

        def copy(source, target):
            plgpu.copy_gmem_to_smem(source, target, full)

        @pl.when(w == 0)
        def _():
            for i, part in enumerate(parts):
                copy(k.at[b, tokens, key_head, part], k_s.at[i])
                copy(q.at[b, tokens, key_head, part], q_s.at[i])
                copy(v.at[b, tokens, r, part], v_s.at[i])
                copy(do.at[b, tokens, r, part], do_s.at[i])
                copy(dr.at[z, b, r, :, part], dr_s.at[i])
                for j, other in enumerate(parts):
                    copy(states.at[z, b, r, part, other], s_s.at[i, j])
                    copy(dstates.at[z, b, r, part, other], ds_s.at[i, j])
            copy(t_inv.at[z, b, r], t_s)
            copy(gates.at[z, b, r], gates_s)

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        def decay():
            i, j = indices()
            seen = (i >= j) & (load_row(gates_s.at[4]) == load_column(gates_s.at[4]))
            difference = load_row(gates_s.at[0]) - load_column(gates_s.at[0])
            return jnp.exp(jnp.where(seen, difference, -jnp.inf))

        def add_pairs(e, dbeta):
            sums_s[w, 0] = jnp.sum(e, axis=1)
            sums_s[w, 1] = jnp.sum(e, axis=0)
            sums_s[w, 3] = dbeta

        plgpu.barrier_wait(full)
        (k_state,) = products([(k_s.at[i], s_s.at[i, w]) for i in range(W)])
        rest = load(v_s.at[w]) - load_row(gates_s.at[1]) * k_state
        dbeta = jnp.sum(load(dr_s.at[w]) * rest, axis=1)
        v_s[w] = (load_row(gates_s.at[3]) * rest).astype(dtype)
        plgpu.commit_smem()
        (v_new,) = products([(t_s, v_s.at[w])])
        v_s[w] = v_new.astype(dtype)
        meet()

        def query_pairs():
            dp, scores = products(
                [(do_s.at[i], v_s.at[i].T) for i in range(W)],
                [(q_s.at[i], k_s.at[i].T) for i in range(W)],
            )
            dqk = scale * dp * decay()
            dqk_s[...] = dqk.astype(dtype)
            return dqk * scores

        def key_pairs():
            dr_v, pairs = products(
                [(dr_s.at[i], v_s.at[i].T) for i in range(W)],
                [(k_s.at[i], k_s.at[i].T) for i in range(W)],
            )
            i, j = indices()
            da = jnp.where(i > j, -decay() * dr_v, 0.0)
            y = load_row(gates_s.at[3]) * da
            y_s[...] = y.astype(dtype)
            return y * pairs, jnp.sum(da * pairs, axis=1)

        if W == 1:
            e, of_pairs = key_pairs()
            add_pairs(query_pairs() + e, dbeta + of_pairs)
        else:

            @pl.when(w == 0)
            def _():
                add_pairs(query_pairs(), dbeta)

            @pl.when(w == W - 1)
            def _():
                e, of_pairs = key_pairs()
                add_pairs(e, dbeta + of_pairs)

        meet()
        a, beta = load_row(gates_s.at[1]), load_row(gates_s.at[3])
        (do_state,) = products([(do_s.at[i], s_s.at[w, i].T) for i in range(W)])
        dq_state = scale * a * do_state
        of_rows = jnp.sum(load(q_s.at[w]) * dq_state, axis=1)
        (dqk_k,) = products([(dqk_s, k_s.at[w])])
        dq_own = (dq_state + dqk_k).astype(dtype)

        (dr_state,) = products([(dr_s.at[i], s_s.at[w, i].T) for i in range(W)])
        dk_read = -a * beta * dr_state
        of_rows = of_rows + jnp.sum(load(k_s.at[w]) * dk_read, axis=1)
        sums_s[w, 0] = plgpu.load(sums_s.at[w, 0], layout=plgpu.Layout.WGMMA.reduce(1)) + of_rows
        (v_dstate,) = products([(v_s.at[i], ds_s.at[w, i].T) for i in range(W)])
        dk_write = load_row(gates_s.at[2]) * v_dstate
        sums_s[w, 2] = jnp.sum(load(k_s.at[w]) * dk_write, axis=1)
        pairs = [(dqk_s.T, q_s.at[w]), (y_s, k_s.at[w]), (y_s.T, k_s.at[w])]
        (dk_pairs,) = products(pairs)
        dk_own = (dk_read + dk_write + dk_pairs).astype(dtype)

        kept = load(s_s.at[w, 0]) * load(ds_s.at[w, 0])
        for i in range(1, W):
            kept = kept + load(s_s.at[w, i]) * load(ds_s.at[w, i])
        sums_s[w, 4] = jnp.sum(kept, axis=1)

        meet()  # all have read what the results overwrite
        own = pl.ds(w * TILE, TILE)
        do_s[w] = dq_own
        v_s[w] = (
            by_row(plgpu.load(gates_s.at[3], layout=plgpu.Layout.WGMMA.reduce(1)))
            * load(dr_s.at[w])
        ).astype(dtype)
        dr_s[w] = dk_own
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(do_s.at[w], dq.at[b, tokens, r, own])
        plgpu.copy_smem_to_gmem(dr_s.at[w], dk.at[b, tokens, r, own])
        plgpu.copy_smem_to_gmem(v_s.at[w], dv.at[b, tokens, r, own])
        plgpu.copy_smem_to_gmem(sums_s.at[w], sums.at[z, b, r, w])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=(
            *[jax.ShapeDtypeStruct((B, Z * C, R, H), dtype)] * 3,
            jax.ShapeDtypeStruct((Z, B, R, W, SUMS, C), jnp.float32),
        ),
        scratch_types=(
            *[tiles(dtype, W)] * 5,
            *[tiles(dtype, W, W)] * 2,
            *[tiles(dtype)] * 3,
            plgpu.SMEM((rows, C), jnp.float32),
            plgpu.SMEM((W, SUMS, C), jnp.float32),
            plgpu.Barrier(num_arrivals=5 * W + 2 * W * W + 2),
            plgpu.Barrier(num_arrivals=W),
        ),
        grid=(Z, B, R),
        grid_names=("chunk", "batch", "head"),
        num_threads=W,
        thread_name="columns",
        kernel_name="gated_delta_rule_gradients",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, v, do, gates, t_inv, states, dstates, dr)
