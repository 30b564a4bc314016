"""Softmax attention on Hopper, backward: one kernel, blocks of keys wait for the queries' tiles.

    P^T = exp2(c K Q^T - lse')     dP^T = V dO^T     dS^T = P^T (dP^T - delta)
    dV += P^T dO     dK += dS^T Q     dQ += dS K              (dQ and dK still times the scale)

with c = scale log2 e, lse' = lse log2 e, delta = sum(o do) (FlashAttention-3, arXiv:2407.08608).
A block has 128 keys of a key head, 64 for each of two warpgroups, whose dK and dV stay in
registers over the tiles of all query heads of the group. Transposed scores are left operands as
they leave the products. dS meets in shared memory, where the warpgroups share dQ = dS K; what a
block adds to dQ goes to device memory as an addition of TMA: in fp32, in no fixed order.

    B batch   T query tokens   S key tokens   N = K G query heads   K key heads   H head dim
    R queries of a tile, so many that R H / 2 = 64 * 64, a warpgroup's share of a tile of dQ
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mosaic_gpu_tiles import (
    KEYS,
    LOG2E,
    ROWS,
    SLOTS,
    along,
    last_freed,
)
from pallas_kernels.hopper import hidden_zero, matrix, parameters, slot_of
from pallas_kernels.zeros import zeros_after

# Rows of `stats`; the last two hold one number each.
LSE, DELTA, FIRST, END, LAST_FIRST, FIRST_END = range(6)


def tile_rows(head_dim: int) -> int:
    """R"""
    return 2 * ROWS * ROWS // head_dim


def backward(scale, q, k, v, do, stats, spans, apart=False):
    """Return (dq / scale [parts,B,T,N,H] fp32, dk, dv like k): what they sum to is dq.

    T and S are whole tiles. `stats` [B,N,T/R,6,R] fp32 are lse' and delta of the queries, the first
    key that each sees and the one behind the last, and the largest and smallest of these in the
    tile. `spans` [B,S/KEYS,2] int32 are the first tile of queries that sees the block of keys and
    the one behind the last. `parts` is 1, or with `apart`, for where nothing can add in device
    memory, S / KEYS: one for each block of keys.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    B, S, K, H = k.shape
    groups = q.shape[2] // K
    W = KEYS // ROWS

    def body(q, k, v, do, stats, spans, dq, dk, dv):
        def run(*scratch):
            b, h, c, w = (jax.lax.axis_index(x) for x in ("batch", "head", "block", "keys"))
            first, last = spans[b, c, 0], spans[b, c, 1]
            keys, own = pl.ds(c * KEYS, KEYS), pl.ds(c * KEYS + w * ROWS, ROWS)
            target = dq.at[c if apart else 0, b]
            tiles = _Tiles(q.at[b], do.at[b], stats.at[b], h * groups, first, last - first)
            walk = _Walk(scale * LOG2E, tiles, *scratch, target, apart, w, c * KEYS)
            steps = groups * (last - first)

            @pl.when(w < W)
            def _():
                plgpu.set_max_registers(240, action="increase")
                dk_own, dv_own = walk.all_tiles(steps)
                walk.store(scale * dk_own, dv_own, dk.at[b, own, h], dv.at[b, own, h])

            @pl.when(w == W)
            def _():
                plgpu.set_max_registers(24, action="decrease")
                walk.fetch(k.at[b, keys, h], v.at[b, keys, h], steps)

        pl.run_scoped(run, *_scratch(q.dtype, H, W), collective_axes="keys")

    kernel = pl.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        mesh=plgpu.Mesh(
            grid=(K, S // KEYS, B),
            grid_names=("head", "block", "batch"),
            num_threads=W + 1,
            thread_name="keys",
        ),
        compiler_params=parameters(),
        name="attention_backward",
    )
    parts = S // KEYS if apart else 1
    dq = jax.new_ref(zeros_after(do, (parts, *q.shape), jnp.float32))
    dk, dv = kernel(q, k, v, do, stats, spans, dq)
    return jax.freeze(dq), dk, dv


class _Shared(NamedTuple):
    k: Any  # and then dk
    v: Any  # and then dv
    q: Any
    do: Any
    stats: Any
    ds: Any  # transposed, of two tiles, so that one meeting a tile is enough
    dq: Any  # of each warpgroup


class _Barriers(NamedTuple):
    keys: Any  # full
    q: Any
    do: Any
    q_free: Any
    do_free: Any
    met: Any


def _scratch(dtype, H, W):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    R = tile_rows(H)
    block, tile = matrix(dtype, 1, KEYS, H), matrix(dtype, SLOTS, R, H)
    shared = _Shared(
        block,
        block,
        tile,
        tile,
        plgpu.SMEM((SLOTS, 6, R), jnp.float32),
        matrix(dtype, 2, KEYS, R),
        matrix(jnp.float32, W, ROWS, ROWS),
    )
    free = plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS)
    barriers = _Barriers(
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        plgpu.Barrier(num_barriers=SLOTS),
        free,
        free,
        plgpu.Barrier(num_arrivals=W),
    )
    return [shared, barriers]


class _Tiles(NamedTuple):
    """The tiles of queries that see a block of keys, those of one query head after another."""

    q: Any
    do: Any
    stats: Any
    head: Any  # the first of the group
    first: Any
    count: Any  # of one head

    def place(self, i):
        """Query head and tile of step i."""
        g = jax.lax.div(i, self.count)
        return self.head + g, self.first + i - g * self.count


class _Walk(NamedTuple):
    """A block of keys and its walk over tiles, by one warpgroup."""

    factor: float  # c
    tiles: Any
    shared: Any
    barriers: Any
    dq: Any  # [T,N,H] in device memory
    apart: bool
    w: Any
    start: Any  # the block's first key

    def fetch(self, k, v, steps):
        """The third warpgroup: the block, and tiles as far ahead as there is room."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        for source, target in ((k, self.shared.k), (v, self.shared.v)):
            plgpu.copy_gmem_to_smem(source, target.at[0], self.barriers.keys)
        R, slots, barriers = self.shared.stats.shape[2], self.shared, self.barriers

        @pl.loop(0, steps)
        def _(i):
            slot = slot_of(i, SLOTS)
            head, tile = self.tiles.place(i)
            rows, full = pl.ds(tile * R, R), barriers.q.at[slot]
            pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(barriers.q_free.at[slot]))
            plgpu.copy_gmem_to_smem(self.tiles.q.at[rows, head], slots.q.at[slot], full)
            plgpu.copy_gmem_to_smem(self.tiles.stats.at[head, tile], slots.stats.at[slot], full)
            pl.when(i >= SLOTS)(lambda: plgpu.barrier_wait(barriers.do_free.at[slot]))
            full = barriers.do.at[slot]
            plgpu.copy_gmem_to_smem(self.tiles.do.at[rows, head], slots.do.at[slot], full)

        last_freed(steps, barriers.q_free, barriers.do_free)

    @property
    def own(self):
        """The warpgroup's keys in the block."""
        from jax.experimental import pallas as pl

        return pl.ds(self.w * ROWS, ROWS)

    def meet(self):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.commit_smem()
        plgpu.barrier_arrive(self.barriers.met)
        plgpu.barrier_wait(self.barriers.met)

    def all_tiles(self, steps):
        """dk / scale and dv of the warpgroup's keys."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        zeros = jnp.zeros((ROWS, self.shared.k.shape[2]), jnp.float32)
        zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        plgpu.barrier_wait(self.barriers.keys)
        return jax.lax.fori_loop(0, steps, self.tile, (zeros, zeros))

    def tile(self, i, carry):
        """One tile of queries."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        R = self.shared.stats.shape[2]
        dk, dv = (plgpu.ACC.init(x) for x in carry)
        s, dq = plgpu.ACC((ROWS, R), jnp.float32), plgpu.ACC((ROWS, ROWS), jnp.float32)

        def run(sums):
            pl.run_scoped(lambda *accs: self._multiply(i, *sums, *accs), s, s, dq)

        return pl.run_state(run)((dk, dv))

    def _multiply(self, i, dk, dv, s_acc, dp_acc, dq_acc):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        x, barriers, own = self.shared, self.barriers, self.own
        slot = slot_of(i, SLOTS)
        only = hidden_zero(self.w, i)
        k, v = x.k.at[only], x.v.at[only]
        q, do, stats = (a.at[slot] for a in (x.q, x.do, x.stats))
        ds_s = x.ds.at[slot_of(i, 2)]
        plgpu.barrier_wait(barriers.q.at[slot])
        plgpu.wgmma(s_acc, k.at[own], q.T)
        plgpu.barrier_wait(barriers.do.at[slot])
        plgpu.wgmma(dp_acc, v.at[own], do.T)
        s = self._masked(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), stats)
        p = jnp.exp2(s * self.factor - self._along(stats, LSE)).astype(q.dtype)
        plgpu.wgmma(dv, p, do)
        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
        p, dp = jax.lax.optimization_barrier((p, dp))  # before delta, which takes registers
        dp = dp - self._along(stats, DELTA)
        ds = (p.astype(jnp.float32) * dp).astype(q.dtype)
        ds_s[own] = ds
        self.meet()
        rows, dims = self._share()
        plgpu.wgmma(dq_acc, ds_s.at[:, rows].T, k.at[:, dims])
        plgpu.wgmma(dk, ds, q)
        dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
        plgpu.barrier_arrive(barriers.do_free.at[slot])
        self._add(i, dq)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(barriers.q_free.at[slot])

    def _share(self):
        """Rows and dims of a tile of dQ that are this warpgroup's: half of one of them."""
        from jax.experimental import pallas as pl

        whole, half = pl.ds(0, ROWS), pl.ds(self.w * ROWS, ROWS)
        return (half, whole) if self.shared.k.shape[2] == ROWS else (whole, half)

    def _add(self, i, dq):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        part, (rows, dims) = self.shared.dq.at[self.w], self._share()
        head, tile = self.tiles.place(i)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        part[...] = dq
        plgpu.commit_smem()
        rows = pl.ds(tile * self.shared.stats.shape[2] + rows.start, ROWS)
        operation = None if self.apart else "add"
        plgpu.copy_smem_to_gmem(part, self.dq.at[rows, head, dims], reduction_op=operation)

    def _along(self, stats, row):
        """One number for each query, repeated over the keys."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        x = plgpu.load(stats.at[row], layout=plgpu.Layout.WGMMA.reduce(0))
        return along(x, (ROWS, stats.shape[1]), 1)

    def _masked(self, s, stats):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        start = (self.start + self.w * ROWS).astype(jnp.float32)

        def hidden(s, row, side):
            keys = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
            at = start + keys.astype(jnp.float32)
            return jnp.where(side(at, self._along(stats, row)), -jnp.inf, s)

        # One bound after the other: registers are scarce.
        for row, some, side in (
            (FIRST, stats[LAST_FIRST, 0] > start, jnp.less),
            (END, stats[FIRST_END, 0] < start + ROWS, jnp.greater_equal),
        ):
            s = jax.lax.cond(some, functools.partial(hidden, row=row, side=side), lambda s: s, s)
        return s

    def store(self, dk, dv, dk_to, dv_to):
        """Into the place of k and v, when both warpgroups have read them."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        self.meet()
        k, v = (x.at[0, self.own] for x in (self.shared.k, self.shared.v))
        k[...] = dk.astype(k.dtype)
        v[...] = dv.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk_to)
        plgpu.copy_smem_to_gmem(v, dv_to)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
