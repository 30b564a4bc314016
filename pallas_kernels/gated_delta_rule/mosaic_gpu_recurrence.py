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

from typing import Any, NamedTuple

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
    products,
)
from pallas_kernels.hopper import matrix, parameters, slot_of

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

    def body(*refs):
        sources, (starts, o, end, *states, shared, own, barriers) = refs[:5], refs[5:]
        b, r, n, w = (jax.lax.axis_index(x) for x in ("batch", "head", "segment", "values"))
        own, values = [x.at[w] for x in own], pl.ds(w * TILE, TILE)
        first, stop = n * L, jnp.minimum((n + 1) * L, Z)
        place = b, r, jax.lax.div(r, jnp.int32(R // K)), w, values
        walk = _Walk(scale, sources, (o, *states), shared, own, *barriers, *place, first, stop)
        walk.begin()
        layout = plgpu.Layout.WGMMA
        state = plgpu.load(starts.at[n, b, r, values], layout=layout, optimized=False)
        state = jax.lax.fori_loop(0, stop - first, walk.chunk, state)
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
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=_scratch(dtype, (C, H, E, W, rows), residuals),
        grid=(R, B, N),
        grid_names=("head", "batch", "segment"),
        num_threads=W,
        thread_name="values",
        compiler_params=parameters(),
        kernel_name="gdn_recurrence",
    )
    o, state, *states = kernel(q, k, v, t_inv, gates, starts)
    return o, state, states[0] if residuals else None


def _scratch(dtype, dims, residuals):
    """Two chunks that the block shares, what each warpgroup has of its own, and the barriers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    C, H, E, W, rows = dims
    shared = [matrix(dtype, SLOTS, *x) for x in ((2 * C, H), (C, E), (C, C))]
    own = [matrix(dtype, W, C, C), matrix(dtype, W, C, TILE)]
    return [
        [*shared, plgpu.SMEM((SLOTS, rows, C), jnp.float32)],
        [*own, matrix(dtype, W, H, TILE)] if residuals else own,
        [
            plgpu.Barrier(num_arrivals=5, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS),
        ],
    ]


class _Walk(NamedTuple):
    """One warpgroup's walk over a segment; without residuals, no states among the `results`."""

    scale: float
    sources: Any  # q, k, v, t_inv, gates in device memory
    results: Any  # o, states
    shared: Any  # k and q in one, v, t_inv, gates of two chunks
    own: Any  # P, o, the state
    full: Any
    free: Any
    b: Any
    r: Any
    key_head: Any
    w: Any
    values: Any
    first: Any
    stop: Any

    def fetch(self, z, slot):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        q, k, v, t_inv, gates = self.sources
        kq_s, v_s, t_s, gates_s = (x.at[slot] for x in self.shared)
        C = v_s.shape[0]
        tokens, of_head = pl.ds(z * C, C), (z, self.b, self.r)
        for source, target in (
            (k.at[self.b, tokens, self.key_head], kq_s.at[pl.ds(0, C)]),
            (q.at[self.b, tokens, self.key_head], kq_s.at[pl.ds(C, C)]),
            (t_inv.at[of_head], t_s),
            (gates.at[of_head], gates_s),
            (v.at[self.b, tokens, self.r], v_s),
        ):
            plgpu.copy_gmem_to_smem(source, target, self.full.at[slot])

    def begin(self):
        from jax.experimental import pallas as pl

        for slot in range(SLOTS):

            @pl.when((self.w == 0) & (self.first + slot < self.stop))
            def _(slot=slot):
                self.fetch(self.first + slot, slot)

    def scores(self, q_i, k_i, gate_i):
        """P; the decays are computed while the product is."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        def multiply(acc):
            plgpu.wgmma(acc, q_i, k_i.T)
            decays = self.scale * decay(gate_i.at[CUMULATIVE], gate_i.at[RUN])
            return decays * acc[...]

        C = k_i.shape[0]
        return pl.run_scoped(multiply, plgpu.ACC((C, C), jnp.float32))

    def chunk(self, i, state):
        """The state behind the i-th chunk of the segment from that before it."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        z, slot = self.first + i, slot_of(i, SLOTS)
        plgpu.barrier_wait(self.full.at[slot])
        kq_i, v_i, t_i, gate_i = (x.at[slot] for x in self.shared)
        (p_s, o_s, *state_s), (o, *states) = self.own, self.results
        C, dtype = v_i.shape[0], v_i.dtype
        k_i, q_i = kq_i.at[pl.ds(0, C)], kq_i.at[pl.ds(C, C)]
        s = state.astype(dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        p_s[...] = self.scores(q_i, k_i, gate_i).astype(dtype)
        if states:
            state_s[0].T[...] = s
        plgpu.commit_smem()
        if states:
            plgpu.copy_smem_to_gmem(state_s[0], states[0].at[z, self.b, self.r, :, self.values])

        (by_state,) = products([(s, kq_i.T)])
        a = load_column(gate_i.at[READ])
        left = load(v_i.at[:, self.values].T) - a * by_state[:, :C]
        left = load_column(gate_i.at[BETA]) * left
        (v_new,) = products([(left.astype(dtype), t_i.T)])

        def write(accs):
            state_acc, o_acc = accs
            added = load_column(gate_i.at[WRITE]) * v_new
            plgpu.wgmma(state_acc, added.astype(dtype), k_i)
            plgpu.wgmma(o_acc, v_new.astype(dtype), p_s.T)

        kept, o_state = gate_i[KEEP, 0] * state, self.scale * a * by_state[:, C:]
        init = plgpu.ACC.init
        state, o_i = pl.run_state(write)((init(kept), init(o_state)))
        o_s.T[...] = o_i.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s, o.at[self.b, pl.ds(z * C, C), self.r, self.values])
        pl.when(z + SLOTS < self.stop)(lambda: self.refill(z + SLOTS, slot))
        return state

    def refill(self, z, slot):
        """When all have read the slot."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.barrier_arrive(self.free.at[slot])

        @pl.when(self.w == 0)
        def _():
            plgpu.barrier_wait(self.free.at[slot])
            self.fetch(z, slot)
