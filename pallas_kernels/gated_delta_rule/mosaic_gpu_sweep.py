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


def sweep(scale, q, k, do, gates, t_inv, ends, length, every_chunk=True):
    """Return dS^T at the segments' starts [N,B,R,E,H], dS+^T of every chunk [Z,B,R,E,H] and dR~.

    q, k [B,Z*C,K,H] and do [B,Z*C,R,E] are whole chunks, gates [Z,B,R,6,C] fp32, t_inv
    [Z,B,R,C,C]. `ends` [N,B,R,E,H] is dS^T behind the last N segments of `length` chunks, of which
    the last one may be shorter; earlier ones are left out. dR~ [Z,B,R,C,E] and dS+^T have q's
    dtype, the others are fp32. Without `every_chunk` only the first is computed and returned.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    H, E = q.shape[3], do.shape[3]
    W, groups, dtype = E // TILE, R // q.shape[2], q.dtype
    N = ends.shape[0]
    skipped = -(-Z // length) - N

    def body(q, k, do, gates, t_inv, ends, starts, *rest):
        (dstates, dr), rest = (rest[:2], rest[2:]) if every_chunk else ((None, None), rest)
        (q_s, k_s, do_s, t_s, gates_s), own, (full, free) = rest
        b, r, m, w = (jax.lax.axis_index(x) for x in ("batch", "head", "segment", "values"))
        p_s, *own = (x.at[w] for x in own)
        first = (m + skipped) * length
        stop = jnp.minimum(first + length, Z)
        chunks = stop - first
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

        for slot in range(SLOTS):

            @pl.when((w == 0) & (slot < chunks))
            def _(slot=slot):
                fetch(stop - 1 - slot, slot)

        def store_p(scores, slot):
            gate = gates_s.at[slot]
            p_s[...] = (scale * decay(gate.at[CUMULATIVE], gate.at[RUN]) * scores).astype(dtype)

        def chunk(n, ds):
            z, slot, ahead = stop - 1 - n, jax.lax.rem(n, SLOTS), jax.lax.rem(n + 1, SLOTS)
            gate, do_t = gates_s.at[slot], do_s.at[slot, :, values].T
            a = load_column(gate.at[READ])
            ds_operand = ds.astype(dtype)
            if every_chunk:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                own[0][...] = ds_operand
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own[0], dstates.at[z, b, r, values])
            do_operand = (scale * a * load(do_t)).astype(dtype)

            def read(accs):
                ds_k, do_p, ds = accs
                plgpu.wgmma(ds_k, ds_operand, k_s.at[slot].T)
                plgpu.wgmma(do_p, do_t, p_s)
                plgpu.wgmma(ds, do_operand, q_s.at[slot])

            starts = zeros(C), zeros(C), gates_s[slot, KEEP, 0] * ds
            ds_k, do_p, ds = pl.run_state(read)(tuple(map(plgpu.ACC.init, starts)))
            dv = (do_p + load_column(gate.at[WRITE]) * ds_k).astype(dtype)
            pl.when(n + 1 < chunks)(lambda: plgpu.barrier_wait(full.at[ahead]))
            # Behind the last chunk this is of an old slot, and nobody reads it.
            dr_new, scores = products([(dv, t_s.at[slot])], [(q_s.at[ahead], k_s.at[ahead].T)])
            removed = (-a * load_column(gate.at[BETA]) * dr_new).astype(dtype)

            def remove(acc):
                plgpu.wgmma(acc, removed, k_s.at[slot])
                store_p(scores, ahead)
                if every_chunk:
                    own[1].T[...] = dr_new.astype(dtype)
                plgpu.commit_smem()
                if every_chunk:
                    plgpu.copy_smem_to_gmem(own[1], dr.at[z, b, r, :, values])

            ds = pl.run_state(remove)(plgpu.ACC.init(ds))

            @pl.when(n + SLOTS < chunks)
            def _():
                plgpu.barrier_arrive(free.at[slot])
                plgpu.barrier_wait(free.at[slot])
                pl.when(w == 0)(lambda: fetch(z - SLOTS, slot))

            return ds

        plgpu.barrier_wait(full.at[0])
        (scores,) = products([(q_s.at[0], k_s.at[0].T)])
        store_p(scores, 0)
        plgpu.commit_smem()
        layout = plgpu.Layout.WGMMA
        end = plgpu.load(ends.at[m, b, r, values], layout=layout, optimized=False)
        starts[m, b, r, values] = jax.lax.fori_loop(0, chunks, chunk, end)
        plgpu.wait_smem_to_gmem(0)

    out_type = [jax.ShapeDtypeStruct((N, B, R, E, H), jnp.float32)]
    own = [matrix(dtype, W, C, C)]
    if every_chunk:
        out_type += [jax.ShapeDtypeStruct((Z, B, R, *x), dtype) for x in ((E, H), (C, E))]
        own += [matrix(dtype, W, TILE, H), matrix(dtype, W, C, TILE)]
    shared = [matrix(dtype, SLOTS, C, x) for x in (H, H, E, C)]
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            [*shared, plgpu.SMEM((SLOTS, rows, C), jnp.float32)],
            own,
            [
                plgpu.Barrier(num_arrivals=5, num_barriers=SLOTS),
                plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS),
            ],
        ],
        grid=(R, B, N),
        grid_names=("head", "batch", "segment"),
        num_threads=W,
        thread_name="values",
        kernel_name="gdn_sweep" if every_chunk else "gdn_segment_sweep",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, do, gates, t_inv, ends)
