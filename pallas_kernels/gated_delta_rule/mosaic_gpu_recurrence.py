"""The recurrence over the chunks of a head on Hopper, with the state in registers, transposed.

Per chunk, with the letters of the README and everything of the state's side transposed:

    KS^T = S^T K^T      R^T = V^T - a KS^T      V'^T = (beta R)^T X^T
    O^T  = s a (S^T Q^T) + V'^T P^T             S^T <- y S^T + (z V')^T K

So S^T, R^T and V'^T, each the result of a product, are left operands of the next one and never
leave the registers: wgmma takes that operand from there. The rows of S^T do not mix: a warpgroup
has 64 of them, and those of a block share what TMA brings. A block walks over a segment of the
chunks (`mosaic_gpu_segments.py`).

    B batch   Z chunks   C rows of a chunk   K key heads   R value heads   H key dim   E value dim
    N segments of L chunks   W warpgroups of values, E / 64, the height of a product
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
)

SLOTS = 2


def recurrence(scale, q, k, v, gates, t_inv, starts, residuals):
    """Return (o, last state^T, states at the chunk starts [Z,B,R,H,E] or None without `residuals`).

    q, k [B,Z*C,K,H], v and o [B,Z*C,R,E], gates [Z,B,R,6,C] fp32, t_inv [Z,B,R,C,C], starts
    [N,B,R,E,H] fp32 the transposed states before the segments, last state^T [B,R,E,H] fp32, the
    states at the chunk starts in q's dtype.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    K, H, E, N = q.shape[2], q.shape[3], v.shape[3], starts.shape[0]
    W, L = E // TILE, -(-Z // N)
    dtype = q.dtype

    def body(q, k, v, gates, t_inv, starts, o, end, *rest):
        states, rest = (rest[0], rest[1:]) if residuals else (None, rest)
        (kq_s, v_s, t_s, gates_s), own, (full, free) = rest
        b, r, n, w = (jax.lax.axis_index(x) for x in ("batch", "head", "segment", "values"))
        p_s, o_s, state_s = (x.at[w] for x in own)
        key_head = jax.lax.div(r, jnp.int32(R // K))
        values = pl.ds(w * TILE, TILE)
        first, stop = n * L, jnp.minimum((n + 1) * L, Z)

        def fetch(z, slot):
            rows, barrier = pl.ds(z * C, C), full.at[slot]
            plgpu.copy_gmem_to_smem(k.at[b, rows, key_head], kq_s.at[slot, pl.ds(0, C)], barrier)
            plgpu.copy_gmem_to_smem(q.at[b, rows, key_head], kq_s.at[slot, pl.ds(C, C)], barrier)
            plgpu.copy_gmem_to_smem(t_inv.at[z, b, r], t_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(gates.at[z, b, r], gates_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(v.at[b, rows, r], v_s.at[slot], barrier)

        for slot in range(SLOTS):

            @pl.when((w == 0) & (first + slot < stop))
            def _(slot=slot):
                fetch(first + slot, slot)

        def scores(q_i, k_i, gate_i):
            """P; the decays are computed while the product is."""

            def multiply(acc):
                plgpu.wgmma(acc, q_i, k_i.T)
                decays = scale * decay(gate_i.at[CUMULATIVE], gate_i.at[RUN])
                return decays * acc[...]

            return pl.run_scoped(multiply, plgpu.ACC((C, C), jnp.float32))

        def chunk(i, state):
            z, slot = first + i, jax.lax.rem(i, jnp.array(SLOTS, i.dtype))
            plgpu.barrier_wait(full.at[slot])
            kq_i, gate_i = kq_s.at[slot], gates_s.at[slot]
            k_i, q_i = kq_i.at[pl.ds(0, C)], kq_i.at[pl.ds(C, C)]
            s = state.astype(dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            p_s[...] = scores(q_i, k_i, gate_i).astype(dtype)
            if residuals:
                state_s.T[...] = s
            plgpu.commit_smem()
            if residuals:
                plgpu.copy_smem_to_gmem(state_s, states.at[z, b, r, :, values])

            (by_state,) = products([(s, kq_i.T)])
            a = load_column(gate_i.at[READ])
            left = load(v_s.at[slot, :, values].T) - a * by_state[:, :C]
            left = load_column(gate_i.at[BETA]) * left
            (v_new,) = products([(left.astype(dtype), t_s.at[slot].T)])

            def write(accs):
                state_acc, o_acc = accs
                added = load_column(gate_i.at[WRITE]) * v_new
                plgpu.wgmma(state_acc, added.astype(dtype), k_i)
                plgpu.wgmma(o_acc, v_new.astype(dtype), p_s.T)

            kept, o_state = gate_i[KEEP, 0] * state, scale * a * by_state[:, C:]
            init = plgpu.ACC.init
            state, o_i = pl.run_state(write)((init(kept), init(o_state)))
            o_s.T[...] = o_i.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s, o.at[b, pl.ds(z * C, C), r, values])

            @pl.when(z + SLOTS < stop)
            def _():
                plgpu.barrier_arrive(free.at[slot])

                @pl.when(w == 0)
                def _():
                    plgpu.barrier_wait(free.at[slot])
                    fetch(z + SLOTS, slot)

            return state

        layout = plgpu.Layout.WGMMA
        state = plgpu.load(starts.at[n, b, r, values], layout=layout, optimized=False)
        state = jax.lax.fori_loop(0, stop - first, chunk, state)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(n == N - 1)
        def _():
            end[b, r, values] = state

    out_type = [
        jax.ShapeDtypeStruct(v.shape, dtype),
        jax.ShapeDtypeStruct((B, R, E, H), jnp.float32),
    ]
    if residuals:
        out_type.append(jax.ShapeDtypeStruct((Z, B, R, H, E), dtype))
    shared = [matrix(dtype, SLOTS, *x) for x in ((2 * C, H), (C, E), (C, C))]
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            [*shared, plgpu.SMEM((SLOTS, rows, C), jnp.float32)],
            [matrix(dtype, W, *x) for x in ((C, C), (C, TILE), (H, TILE))],
            [
                plgpu.Barrier(num_arrivals=5, num_barriers=SLOTS),
                plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS),
            ],
        ],
        grid=(R, B, N),
        grid_names=("head", "batch", "segment"),
        num_threads=W,
        thread_name="values",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="gdn_recurrence",
    )
    o, state, *states = kernel(q, k, v, gates, t_inv, starts)
    return o, state, states[0] if residuals else None
