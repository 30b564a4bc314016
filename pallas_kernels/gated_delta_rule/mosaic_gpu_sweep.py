"""The serial half of the gated delta rule's backward on Hopper: the state's gradient, from the end.

Per chunk, with the letters of the README and everything of the state's side transposed:

    dV'^T = dO^T P + z (dS+^T K^T)      dR~^T = dV'^T X
    dS^T  = y dS+^T + s (a dO)^T Q - (a beta dR~)^T K

So dS^T, dV'^T and dR~^T, each the result of a product, are left operands of the next one and never
leave the registers. The rows of dS^T do not mix: every warpgroup has 64 of them, from the last
chunk to the first, and shares what it reads with the others. Two slots are filled ahead by TMA, and
P of a chunk is computed beside the one after it.

    B batch   Z chunks   C = 64 rows of a chunk   K key heads   R value heads   H key dim
    E value dim   W warpgroups, E / 64
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import (
    BETA,
    CUMULATIVE,
    KEEP,
    READ,
    RUN,
    WRITE,
)
from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import (
    TILE,
    decay,
    load,
    load_column,
    matrix,
    products,
    zeros,
)

SLOTS = 2


def sweep(scale, q, k, do, gates, t_inv, dstate):
    """Return dS+^T of every chunk [Z,B,R,E,H], dR~ [Z,B,R,C,E] and dS^T at the start [B,R,E,H].

    q, k [B,Z*C,K,H] and do [B,Z*C,R,E] are whole chunks, gates [Z,B,R,6,C] fp32, t_inv
    [Z,B,R,C,C], dstate [B,R,E,H] fp32, transposed. Results have q's dtype, the last one is fp32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    H, E = q.shape[3], do.shape[3]
    W, groups, dtype = E // TILE, R // q.shape[2], q.dtype

    def body(q, k, do, gates, t_inv, dstate, dstates, dr, dstate_start, *scratch):
        q_s, k_s, do_s, t_s, gates_s, *own, full, free = scratch
        b, r, w = (jax.lax.axis_index(name) for name in ("batch", "head", "values"))
        p_s, dr_s, ds_s = (x.at[w] for x in own)
        key_head = jax.lax.div(r, jnp.int32(groups))
        values = pl.ds(w * TILE, TILE)

        def fetch(z, slot):
            tokens = pl.ds(z * C, C)
            for source, target in (
                (q.at[b, tokens, key_head], q_s),
                (k.at[b, tokens, key_head], k_s),
                (do.at[b, tokens, r], do_s),
                (t_inv.at[z, b, r], t_s),
                (gates.at[z, b, r], gates_s),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

        @pl.when(w == 0)
        def _():
            for n in range(min(SLOTS, Z)):
                fetch(Z - 1 - n, n)

        def store_p(scores, slot):
            gate = gates_s.at[slot]
            p_s[...] = (scale * decay(gate.at[CUMULATIVE], gate.at[RUN]) * scores).astype(dtype)

        def chunk(n, ds):
            z, slot, ahead = Z - 1 - n, jax.lax.rem(n, SLOTS), jax.lax.rem(n + 1, SLOTS)
            gate, do_t = gates_s.at[slot], do_s.at[slot, :, values].T
            a = load_column(gate.at[READ])
            ds_operand = ds.astype(dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            ds_s[...] = ds_operand
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ds_s, dstates.at[z, b, r, values])
            do_operand = (scale * a * load(do_t)).astype(dtype)

            def read(accs):
                ds_k, do_p, ds = accs
                plgpu.wgmma(ds_k, ds_operand, k_s.at[slot].T)
                plgpu.wgmma(do_p, do_t, p_s)
                plgpu.wgmma(ds, do_operand, q_s.at[slot])

            starts = zeros(C), zeros(C), gates_s[slot, KEEP, 0] * ds
            ds_k, do_p, ds = pl.run_state(read)(tuple(map(plgpu.ACC.init, starts)))
            dv = (do_p + load_column(gate.at[WRITE]) * ds_k).astype(dtype)
            pl.when(n + 1 < Z)(lambda: plgpu.barrier_wait(full.at[ahead]))
            # Behind the last chunk this is of an old slot, and nobody reads it.
            dr_new, scores = products([(dv, t_s.at[slot])], [(q_s.at[ahead], k_s.at[ahead].T)])
            removed = (-a * load_column(gate.at[BETA]) * dr_new).astype(dtype)

            def remove(acc):
                plgpu.wgmma(acc, removed, k_s.at[slot])
                store_p(scores, ahead)
                dr_s.T[...] = dr_new.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(dr_s, dr.at[z, b, r, :, values])

            ds = pl.run_state(remove)(plgpu.ACC.init(ds))

            @pl.when(n + SLOTS < Z)
            def _():
                plgpu.barrier_arrive(free.at[slot])
                plgpu.barrier_wait(free.at[slot])
                pl.when(w == 0)(lambda: fetch(z - SLOTS, slot))

            return ds

        plgpu.barrier_wait(full.at[0])
        (scores,) = products([(q_s.at[0], k_s.at[0].T)])
        store_p(scores, 0)
        plgpu.commit_smem()
        end = plgpu.load(dstate.at[b, r, values], layout=plgpu.Layout.WGMMA, optimized=False)
        dstate_start[b, r, values] = jax.lax.fori_loop(0, Z, chunk, end)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((Z, B, R, E, H), dtype),
            jax.ShapeDtypeStruct((Z, B, R, C, E), dtype),
            jax.ShapeDtypeStruct((B, R, E, H), jnp.float32),
        ),
        scratch_types=[
            matrix(dtype, SLOTS, C, H),
            matrix(dtype, SLOTS, C, H),
            matrix(dtype, SLOTS, C, E),
            matrix(dtype, SLOTS, C, C),
            plgpu.SMEM((SLOTS, rows, C), jnp.float32),
            matrix(dtype, W, C, C),
            matrix(dtype, W, C, TILE),
            matrix(dtype, W, TILE, H),
            plgpu.Barrier(num_arrivals=5, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS),
        ],
        grid=(R, B),
        grid_names=("head", "batch"),
        num_threads=W,
        thread_name="values",
        kernel_name="gdn_sweep",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, do, gates, t_inv, dstate)
