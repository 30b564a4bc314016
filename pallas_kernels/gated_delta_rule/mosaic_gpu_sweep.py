"""The serial half of the gated delta rule's backward on Hopper: the state's gradient, last to first.

Per chunk, with the letters of the README (all but dS can wait for the other half):

    dV' = P^T dO + z K dS+      dR~ = X^T dV'      dS = y dS+ + s (a Q)^T dO - (a beta K)^T dR~

The columns of dS do not mix, so every warpgroup takes 64 of them, in registers from the last chunk
to the first, and shares what it reads with the others. Two slots are filled ahead by TMA.

    B batch   Z chunks   C = 64 rows of a chunk   K key heads   R value heads   H key dim
    E value dim   W warpgroups, E / 64
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import (
    TILE,
    indices,
    load,
    load_column,
    load_row,
    products,
    tiles,
)

SLOTS = 2


def sweep(scale, q, k, do, gates, t_inv, dstate):
    """Return dS+ of every chunk [Z,B,R,H,E], dR~ [Z,B,R,C,E] (both in q's dtype) and dS [B,R,H,E].

    q, k [B,Z*C,K,H] and do [B,Z*C,R,E] are whole chunks, gates [Z,B,R,6,C] fp32 the rows c, a, z,
    beta, run numbers and y; t_inv [Z,B,R,C,C] and dstate [B,R,H,E] fp32 as in the forward.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    H, E = q.shape[3], do.shape[3]
    W, parts = E // TILE, H // TILE
    groups, dtype = R // q.shape[2], q.dtype

    def body(q, k, do, gates, t_inv, dstate, dstates, dr, dstate_in, *scratch):
        q_s, k_s, do_s, t_s, gates_s, *own, full, free = scratch
        b, r, w = (jax.lax.axis_index(name) for name in ("batch", "head", "columns"))
        key_head = jax.lax.div(r, jnp.int32(groups))
        columns = pl.ds(w * TILE, TILE)
        ds_s, scaled_s, dv_s, dr_s, removed_s = (x.at[w] for x in own)

        def fetch(z, slot):
            def copy(source, target):
                plgpu.copy_gmem_to_smem(source, target, full.at[slot])

            tokens = pl.ds(z * C, C)
            for i in range(parts):
                part = pl.ds(i * TILE, TILE)
                copy(q.at[b, tokens, key_head, part], q_s.at[slot, i])
                copy(k.at[b, tokens, key_head, part], k_s.at[slot, i])
            for i in range(W):
                copy(do.at[b, tokens, r, pl.ds(i * TILE, TILE)], do_s.at[slot, i])
            copy(t_inv.at[z, b, r], t_s.at[slot])
            copy(gates.at[z, b, r], gates_s.at[slot])

        @pl.when(w == 0)
        def _():
            for n in range(min(SLOTS, Z)):
                fetch(Z - 1 - n, n)

        def chunk(n, ds):
            z, slot = Z - 1 - n, jax.lax.rem(n, SLOTS)
            plgpu.barrier_wait(full.at[slot])
            q_i, k_i = ([x.at[slot, i] for i in range(parts)] for x in (q_s, k_s))
            do_i, gate = do_s.at[slot, w], gates_s.at[slot]

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i in range(parts):
                ds_s[i] = ds[i].astype(dtype)
            scaled_s[...] = (scale * load_row(gate.at[1]) * load(do_i)).astype(dtype)
            plgpu.commit_smem()
            for i in range(parts):
                part = dstates.at[z, b, r, pl.ds(i * TILE, TILE), columns]
                plgpu.copy_smem_to_gmem(ds_s.at[i], part)
            (scores,) = products([(k_i[i], q_i[i].T) for i in range(parts)])
            # P^T: keys are its rows, queries its columns.
            key, query = indices()
            seen = (query >= key) & (load_row(gate.at[4]) == load_column(gate.at[4]))
            exponent = jnp.where(seen, load_column(gate.at[0]) - load_row(gate.at[0]), -jnp.inf)
            dv_s[...] = (scale * jnp.exp(exponent) * scores).astype(dtype)
            plgpu.commit_smem()
            p_do, k_ds = products([(dv_s, do_i)], [(k_i[i], ds_s.at[i]) for i in range(parts)])
            dv_s[...] = (p_do + load_row(gate.at[2]) * k_ds).astype(dtype)
            plgpu.commit_smem()
            (dr_new,) = products([(t_s.at[slot].T, dv_s)])
            dr_s[...] = dr_new.astype(dtype)
            removed = -load_row(gate.at[1]) * load_row(gate.at[3]) * dr_new
            removed_s[...] = removed.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dr_s, dr.at[z, b, r, :, columns])
            change = products(
                *[[(q_i[i].T, scaled_s), (k_i[i].T, removed_s)] for i in range(parts)]
            )
            kept = gates_s[slot, 5, 0]

            @pl.when(n + SLOTS < Z)
            def _():
                plgpu.commit_smem()  # reads before the copies that overwrite what was read
                plgpu.barrier_arrive(free.at[slot])
                plgpu.barrier_wait(free.at[slot])
                pl.when(w == 0)(lambda: fetch(z - SLOTS, slot))

            return tuple(kept * ds[i] + change[i] for i in range(parts))

        def rows_of(ref, i):
            return ref.at[b, r, pl.ds(i * TILE, TILE), columns]

        wgmma = plgpu.Layout.WGMMA
        ds = [plgpu.load(rows_of(dstate, i), layout=wgmma, optimized=False) for i in range(parts)]
        ds = jax.lax.fori_loop(0, Z, chunk, tuple(ds))
        for i in range(parts):
            rows_of(dstate_in, i)[...] = ds[i]
        plgpu.wait_smem_to_gmem(0)

    shared = (
        tiles(dtype, SLOTS, parts),
        tiles(dtype, SLOTS, parts),
        tiles(dtype, SLOTS, W),
        tiles(dtype, SLOTS),
        plgpu.SMEM((SLOTS, rows, C), jnp.float32),
    )
    copies = 2 * parts + W + 2
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((Z, B, R, H, E), dtype),
            jax.ShapeDtypeStruct((Z, B, R, C, E), dtype),
            jax.ShapeDtypeStruct((B, R, H, E), jnp.float32),
        ),
        scratch_types=(
            *shared,
            tiles(dtype, W, parts),
            *[tiles(dtype, W)] * 4,
            plgpu.Barrier(num_arrivals=copies, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS),
        ),
        grid=(B, R),
        grid_names=("batch", "head"),
        num_threads=W,
        thread_name="columns",
        kernel_name="gated_delta_rule_sweep",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, do, gates, t_inv, dstate)
