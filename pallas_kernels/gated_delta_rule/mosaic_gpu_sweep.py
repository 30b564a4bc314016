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
    zeros,
)
from pallas_kernels.hopper import matrix, parameters, slot_of

SLOTS = 2


def sweep(scale, q, k, do, gates, t_inv, ends, length, felt=None):
    """Return dS^T at the segments' starts [N,B,R,E,H], dS+^T of every chunk [Z,B,R,E,H] and dR~.

    q, k [B,Z*C,K,H] and do [B,Z*C,R,E] are whole chunks, gates [Z,B,R,6,C] fp32, t_inv
    [Z,B,R,C,C]. `ends` [N,B,R,E,H] is dS^T behind the last N segments of `length` chunks, of which
    the last one may be shorter; earlier ones are left out. dR~ [Z,B,R,C,E] and dS+^T have q's
    dtype, the others are fp32. With `felt` [N,B,R], the chunks that each segment's start feels
    (`reach`), the others are left out and only the first result is computed and returned.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    H, E = q.shape[3], do.shape[3]
    W, groups, dtype = E // TILE, R // q.shape[2], q.dtype
    N = ends.shape[0]
    skipped = -(-Z // length) - N
    every_chunk = felt is None

    def body(*refs):
        sources, (ends, *rest) = refs[:5], refs[5:]
        felt = None if every_chunk else rest.pop(0)
        starts, *results, shared, own, barriers = rest
        b, r, m, w = (jax.lax.axis_index(x) for x in ("batch", "head", "segment", "values"))
        first = (m + skipped) * length
        stop = jnp.minimum(first + length, Z)
        if not every_chunk:
            stop = jnp.minimum(first + felt[m, b, r], stop)
        own, values = [x.at[w] for x in own], pl.ds(w * TILE, TILE)
        place = b, r, jax.lax.div(r, jnp.int32(groups)), w, values
        walk = _Walk(scale, sources, results, shared, own, *barriers, *place, stop, stop - first)
        walk.begin()
        layout = plgpu.Layout.WGMMA
        end = plgpu.load(ends.at[m, b, r, values], layout=layout, optimized=False)
        if not every_chunk:
            end = jnp.where(felt[m, b, r] > length, end, 0.0)
        starts[m, b, r, values] = jax.lax.fori_loop(0, stop - first, walk.chunk, end)
        plgpu.wait_smem_to_gmem(0)

    out_type = [jax.ShapeDtypeStruct((N, B, R, E, H), jnp.float32)]
    own = [matrix(dtype, W, SLOTS, C, C)]
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
        compiler_params=parameters(),
    )(q, k, do, t_inv, gates, ends, *([] if every_chunk else [felt]))


class _Walk(NamedTuple):
    """One warpgroup's walk back over a segment; there may be no `results` but its end."""

    scale: float
    sources: Any  # q, k, do, t_inv, gates in device memory
    results: Any  # dstates, dr
    shared: Any  # the sources of two chunks
    own: Any  # P of two chunks, dS+^T, dR~
    full: Any
    free: Any
    b: Any
    r: Any
    key_head: Any
    w: Any
    values: Any
    stop: Any
    chunks: Any

    def fetch(self, z, slot):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        C = self.shared[0].shape[1]
        of_key, tokens = (self.b, pl.ds(z * C, C), self.key_head), (self.b, pl.ds(z * C, C), self.r)
        places = of_key, of_key, tokens, *[(z, self.b, self.r)] * 2
        for source, place, target in zip(self.sources, places, self.shared, strict=True):
            plgpu.copy_gmem_to_smem(source.at[place], target.at[slot], self.full.at[slot])

    def begin(self):
        """Fill the slots and compute P of the last chunk."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        for slot in range(SLOTS):

            @pl.when((self.w == 0) & (slot < self.chunks))
            def _(slot=slot):
                self.fetch(self.stop - 1 - slot, slot)

        plgpu.barrier_wait(self.full.at[0])
        q_s, k_s, *_ = self.shared
        (scores,) = products([(q_s.at[0], k_s.at[0].T)])
        self.store_p(scores, 0)
        plgpu.commit_smem()

    def store_p(self, scores, slot):
        gate, p_s = self.shared[4].at[slot], self.own[0].at[slot]
        decays = decay(gate.at[CUMULATIVE], gate.at[RUN])
        p_s[...] = (self.scale * decays * scores).astype(p_s.dtype)

    def chunk(self, n, ds):
        """dS^T before the n-th chunk from the end, from dS+^T behind it."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        z, slot, ahead = self.stop - 1 - n, slot_of(n, SLOTS), slot_of(n + 1, SLOTS)
        q_s, k_s, do_s, t_s, gates_s = self.shared
        gate, do_t = gates_s.at[slot], do_s.at[slot, :, self.values].T
        a, dtype = load_column(gate.at[READ]), q_s.dtype
        ds_operand = ds.astype(dtype)
        if self.results:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.own[1][...] = ds_operand
            plgpu.commit_smem()
            target = self.results[0].at[z, self.b, self.r, self.values]
            plgpu.copy_smem_to_gmem(self.own[1], target)
        do_operand = (self.scale * a * load(do_t)).astype(dtype)

        def read(accs):
            ds_k, do_p, ds = accs
            plgpu.wgmma(ds_k, ds_operand, k_s.at[slot].T)
            plgpu.wgmma(do_p, do_t, self.own[0].at[slot])
            plgpu.wgmma(ds, do_operand, q_s.at[slot])

        C = k_s.shape[1]
        starts = zeros(C), zeros(C), gates_s[slot, KEEP, 0] * ds
        ds_k, do_p, ds = pl.run_state(read)(tuple(map(plgpu.ACC.init, starts)))
        dv = (do_p + load_column(gate.at[WRITE]) * ds_k).astype(dtype)
        pl.when(n + 1 < self.chunks)(lambda: plgpu.barrier_wait(self.full.at[ahead]))
        # Behind the last chunk this is of an old slot, and nobody reads it.
        dr_new, scores = products([(dv, t_s.at[slot])], [(q_s.at[ahead], k_s.at[ahead].T)])
        removed = (-a * load_column(gate.at[BETA]) * dr_new).astype(dtype)

        def remove(acc):
            plgpu.wgmma(acc, removed, k_s.at[slot])
            self.store_p(scores, ahead)
            if self.results:
                self.own[2].T[...] = dr_new.astype(dtype)
            plgpu.commit_smem()
            if self.results:
                target = self.results[1].at[z, self.b, self.r, :, self.values]
                plgpu.copy_smem_to_gmem(self.own[2], target)

        ds = pl.run_state(remove)(plgpu.ACC.init(ds))
        pl.when(n + SLOTS < self.chunks)(lambda: self.refill(z - SLOTS, slot))
        return ds

    def refill(self, z, slot):
        """When all have read the slot."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.barrier_arrive(self.free.at[slot])
        plgpu.barrier_wait(self.free.at[slot])
        pl.when(self.w == 0)(lambda: self.fetch(z, slot))
