"""The recurrence over the chunks of a head on Hopper, with the state in registers, transposed.

Per chunk, with the letters of the README and everything of the state's side transposed:

    KS^T = S^T K^T      R^T = V^T - a KS^T      V'^T = (beta R)^T X^T
    O^T  = s a (S^T Q^T) + V'^T P^T             S^T <- y S^T + (z V')^T K

So S^T, R^T and V'^T, each the result of a product, are left operands of the next one and never
leave the registers: wgmma takes that operand from there. What it takes from shared memory, K, Q, X
and P, comes by TMA or, for P, from a warpgroup that works ahead. The rows of S^T do not mix: every
warpgroup has 64 of them (values) and they share all the rest.

    B batch   Z chunks   C rows of a chunk   K key heads   R value heads   H key dim   E value dim
    W warpgroups of values, E / 64
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

VALUES = 64  # rows of S^T per warpgroup
SLOTS = 2


def recurrence(scale, q, k, v, gates, t_inv, initial_state, residuals):
    """Return (o, last state, states at the chunk starts [Z,B,R,H,E] or None without `residuals`).

    q, k [B,Z*C,K,H], v and o [B,Z*C,R,E], gates [Z,B,R,6,C] fp32, t_inv [Z,B,R,C,C], states
    [B,R,H,E] fp32, those at the chunk starts in q's dtype.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    K, H, E = q.shape[2], q.shape[3], v.shape[3]
    W = E // VALUES
    dtype, wgmma = q.dtype, plgpu.Layout.WGMMA

    def tile(*shape):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def load(ref, layout=wgmma):
        return plgpu.load(ref, layout=layout)

    def by_column(row_s, size):
        return jax.lax.broadcast_in_dim(load(row_s, wgmma.reduce(0)), (size, C), [1])

    def by_row(row_s, size):
        return jax.lax.broadcast_in_dim(load(row_s, wgmma.reduce(1)), (C, size), [0])

    def body(q, k, v, gates, t_inv, start, o, end, *rest):
        states, rest = (rest[0], rest[1:]) if residuals else (None, rest)
        (kq_s, v_s, t_s, gates_s), own, (full, free) = rest
        b, r, w = (jax.lax.axis_index(name) for name in ("batch", "head", "values"))
        p_s, o_s, state_s = (x.at[w] for x in own)
        key_head = jax.lax.div(r, jnp.int32(R // K))
        values = pl.ds(w * VALUES, VALUES)

        def fetch(z, slot):
            rows, barrier = pl.ds(z * C, C), full.at[slot]
            plgpu.copy_gmem_to_smem(k.at[b, rows, key_head], kq_s.at[slot, pl.ds(0, C)], barrier)
            plgpu.copy_gmem_to_smem(q.at[b, rows, key_head], kq_s.at[slot, pl.ds(C, C)], barrier)
            plgpu.copy_gmem_to_smem(t_inv.at[z, b, r], t_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(gates.at[z, b, r], gates_s.at[slot], barrier)
            plgpu.copy_gmem_to_smem(v.at[b, rows, r], v_s.at[slot], barrier)

        @pl.when(w == 0)
        def _():
            for z in range(min(SLOTS, Z)):
                fetch(z, z)

        def scores(slot):
            """P, stored for the second product of O."""

            def multiply(acc):
                plgpu.wgmma(acc, kq_s.at[slot, pl.ds(C, C)], kq_s.at[slot, pl.ds(0, C)].T)
                return acc[...]

            i, j = (plgpu.broadcasted_iota(jnp.int32, (C, C), n, layout=wgmma) for n in (0, 1))
            gate_s = gates_s.at[slot]
            seen = (i >= j) & (by_row(gate_s.at[RUN], C) == by_column(gate_s.at[RUN], C))
            difference = by_row(gate_s.at[CUMULATIVE], C) - by_column(gate_s.at[CUMULATIVE], C)
            decay = jnp.exp(jnp.where(seen, difference, -jnp.inf))
            p = pl.run_scoped(multiply, plgpu.ACC((C, C), jnp.float32))
            p_s[...] = (scale * decay * p).astype(dtype)

        def chunk(z, state):
            slot = jax.lax.rem(z, jnp.array(SLOTS, z.dtype))
            plgpu.barrier_wait(full.at[slot])
            gate_s = gates_s.at[slot]
            s = state.astype(dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scores(slot)
            if residuals:
                state_s.T[...] = s
            plgpu.commit_smem()
            if residuals:
                plgpu.copy_smem_to_gmem(state_s, states.at[z, b, r, :, values])

            def read(acc):
                plgpu.wgmma(acc, s, kq_s.at[slot].T)
                return acc[...]

            by_state = pl.run_scoped(read, plgpu.ACC((VALUES, 2 * C), jnp.float32))
            a = by_column(gate_s.at[READ], VALUES)
            v_t = load(v_s.at[slot, :, values].T).astype(jnp.float32)
            r_t = by_column(gate_s.at[BETA], VALUES) * (v_t - a * by_state[:, :C])

            def correct(acc):
                plgpu.wgmma(acc, r_t.astype(dtype), t_s.at[slot].T)
                return acc[...]

            v_new = pl.run_scoped(correct, plgpu.ACC((VALUES, C), jnp.float32))

            def write(accs):
                state_acc, o_acc = accs
                added = by_column(gate_s.at[WRITE], VALUES) * v_new
                plgpu.wgmma(state_acc, added.astype(dtype), kq_s.at[slot, pl.ds(0, C)])
                plgpu.wgmma(o_acc, v_new.astype(dtype), p_s.T)

            kept = gate_s[KEEP, 0] * state
            o_start = scale * a * by_state[:, C:]
            init = plgpu.ACC.init
            state, o_t = pl.run_state(write)((init(kept), init(o_start)))
            o_s.T[...] = o_t.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s, o.at[b, pl.ds(z * C, C), r, values])

            @pl.when(z + SLOTS < Z)
            def _():
                plgpu.barrier_arrive(free.at[slot])

                @pl.when(w == 0)
                def _():
                    plgpu.barrier_wait(free.at[slot])
                    fetch(z + SLOTS, slot)

            return state

        state = plgpu.load(start.at[b, r, values], layout=wgmma, optimized=False)
        end_state = jax.lax.fori_loop(0, Z, chunk, state)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        end[b, r, values] = end_state

    out_type = [
        jax.ShapeDtypeStruct(v.shape, dtype),
        jax.ShapeDtypeStruct((B, R, E, H), jnp.float32),
    ]
    if residuals:
        out_type.append(jax.ShapeDtypeStruct((Z, B, R, H, E), dtype))
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=[
            [
                tile(SLOTS, 2 * C, H),
                tile(SLOTS, C, E),
                tile(SLOTS, C, C),
                plgpu.SMEM((SLOTS, rows, C), jnp.float32),
            ],
            [tile(W, C, C), tile(W, C, VALUES), tile(W, H, VALUES)],
            [
                plgpu.Barrier(num_arrivals=5, num_barriers=SLOTS),
                plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS),
            ],
        ],
        grid=(R, B),
        grid_names=("head", "batch"),
        num_threads=W,
        thread_name="values",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="gdn_recurrence",
    )
    o, state, *states = kernel(q, k, v, gates, t_inv, initial_state.swapaxes(-1, -2))
    return o, state.swapaxes(-1, -2), states[0] if residuals else None
