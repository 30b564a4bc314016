"""Softmax attention on Hopper, forward: two warpgroups of queries take turns at the tensor cores.

    s = q k^T    m' = max(m, c max s)    p = exp2(c s - m')    a = exp2(m - m')
    l <- a l + sum p    acc <- a acc + p v    o = acc / l    lse = (m + log2 l) / log2 e

with c = scale log2 e (FlashAttention-3, arXiv:2407.08608; the turns are those of jax's
`attention_mgpu`). A third warpgroup fetches keys and values. While one warpgroup of queries
multiplies, the other is at its exponentials. Long walks start first: the chip then ends evenly.

    B batch   T query tokens   S key tokens   N = K G query heads   K key heads   H head dim
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mosaic_gpu_tiles import (
    KEYS,
    LOG2E,
    LOWEST,
    QUERIES,
    ROWS,
    SLOTS,
    along,
    columns,
    last_freed,
    per_row,
    seen,
)
from pallas_kernels.hopper import matrix, parameters, slot_of


def forward(scale, q, k, v, rows, tiles):
    """Return (o [B,T,N,H] in q's dtype, lse [B,N,T] fp32).

    T and S are whole tiles. `rows` [B,2,T] int32 are the first key that each query sees and the
    one behind the last; `tiles` [B,T/QUERIES,4] int32 the blocks of keys of each tile of queries:
    the first, those all seen by all its rows from ... to, the end.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (B, T, N, H), K = q.shape, k.shape[2]
    W = QUERIES // ROWS

    def body(q, k, v, rows, tiles, o, lse, shared, barriers):
        b, n, w = (jax.lax.axis_index(x) for x in ("batch", "head", "rows"))
        i = T // QUERIES - 1 - jax.lax.axis_index("tile")
        bounds = [tiles[b, i, e] for e in range(4)]
        tokens = pl.ds(i * QUERIES + w * ROWS, ROWS)
        key_head = jax.lax.div(n, jnp.int32(N // K))

        @pl.when(w < W)
        def _():
            plgpu.set_max_registers(232, action="increase")
            walk = _Walk(scale * LOG2E, shared, barriers, w, *bounds)
            plgpu.copy_gmem_to_smem(q.at[b, tokens, n], walk.q, barriers.q.at[w])
            first, end = (per_row(rows.at[b, e, tokens]) for e in range(2))
            plgpu.barrier_wait(barriers.q.at[w])
            acc, top, total = walk.all_keys(first, end)
            walk.store(acc, top, total, o.at[b, tokens, n], lse.at[b, n, tokens])

        @pl.when(w == W)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            _fetch(k.at[b, :, key_head], v.at[b, :, key_head], shared, barriers, *bounds)

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        scratch_types=_scratch(q.dtype, H, W),
        grid=(N, T // QUERIES, B),
        grid_names=("head", "tile", "batch"),
        num_threads=W + 1,
        thread_name="rows",
        compiler_params=parameters(),
        kernel_name="attention_forward",
    )
    return kernel(q, k, v, rows, tiles)


class _Shared(NamedTuple):
    q: Any  # of each warpgroup, and then its o
    k: Any
    v: Any
    lse: Any


class _Barriers(NamedTuple):
    q: Any
    k: Any  # full
    v: Any
    k_free: Any
    v_free: Any
    turn: Any


def _scratch(dtype, H, W):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    block = matrix(dtype, SLOTS, KEYS, H)
    shared = _Shared(matrix(dtype, W, ROWS, H), block, block, plgpu.SMEM((W, ROWS), jnp.float32))
    full = plgpu.Barrier(num_barriers=SLOTS)
    free = plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS)
    barriers = _Barriers(
        plgpu.Barrier(num_barriers=W), full, full, free, free, plgpu.Barrier(num_arrivals=W)
    )
    return [shared, barriers]


def _fetch(k, v, shared, barriers, first, opened, closed, end):
    """The third warpgroup: blocks of keys and values, as far ahead as there is room."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @pl.loop(0, end - first)
    def _(j):
        slot = slot_of(j, SLOTS)
        keys = pl.ds((first + j) * KEYS, KEYS)
        for source, target, full, free in (
            (k, shared.k, barriers.k, barriers.k_free),
            (v, shared.v, barriers.v, barriers.v_free),
        ):
            pl.when(j >= SLOTS)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[keys], target.at[slot], full.at[slot])

    last_freed(end - first, barriers.k_free, barriers.v_free)


class _Walk(NamedTuple):
    """One warpgroup's walk over the keys of its rows."""

    factor: float  # c
    shared: Any
    barriers: Any
    w: Any
    first: Any
    opened: Any
    closed: Any
    end: Any

    @property
    def q(self):
        return self.shared.q.at[self.w]

    def change(self):
        """Let the other warpgroup have the tensor cores, and wait for them."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        plgpu.barrier_arrive(self.barriers.turn)
        plgpu.barrier_wait(self.barriers.turn)

    def all_keys(self, first, end):
        """(acc, m, l) after all blocks of keys."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        row, tile = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
        start = (
            plgpu.layout_cast(jnp.zeros(self.q.shape, jnp.float32), tile),
            plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), row),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row),
        )
        pl.when(self.end > self.first)(lambda: plgpu.barrier_wait(self.barriers.k.at[0]))
        pl.when(self.w == 1)(self.change)

        def masked(j, carry):
            return self.block(j, carry, (first, end))

        carry = jax.lax.fori_loop(self.first, self.opened, masked, start)
        carry = jax.lax.fori_loop(self.opened, self.closed, self.block, carry)
        carry = jax.lax.fori_loop(self.closed, self.end, masked, carry)
        pl.when(self.w == 0)(self.change)
        return carry

    def block(self, j, carry, bounds=None):
        """One block of keys; `bounds` where a row may not see all of them."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        acc, top, total = carry
        at = j - self.first
        slot = slot_of(at, SLOTS)

        def scores(s):
            plgpu.wgmma(s, self.q, self.shared.k.at[slot].T)
            self.change()
            return s[...]

        s = pl.run_scoped(scores, plgpu.ACC((ROWS, KEYS), jnp.float32))
        plgpu.barrier_arrive(self.barriers.k_free.at[slot])
        if bounds is not None:
            s = jnp.where(seen(columns(s.shape, j * KEYS), bounds, s.shape), s, -jnp.inf)
        higher = jnp.maximum(top, s.max(axis=1) * self.factor)
        shrink = jnp.exp2(top - higher)
        p = jnp.exp2(s * self.factor - along(higher, s.shape, 0))
        total = total * shrink + p.sum(axis=1)
        acc = acc * along(shrink, acc.shape, 0)
        p = p.astype(self.q.dtype)
        # The exponentials belong before the turn, not between the products behind it.
        acc, total, higher, p = jax.lax.optimization_barrier((acc, total, higher, p))
        plgpu.barrier_arrive(self.barriers.turn)
        plgpu.barrier_wait(self.barriers.v.at[slot])
        plgpu.barrier_wait(self.barriers.turn)

        def values(acc):
            plgpu.wgmma(acc, p, self.shared.v.at[slot])
            more = j + 1 < self.end
            pl.when(more)(lambda: plgpu.barrier_wait(self.barriers.k.at[slot_of(at + 1, SLOTS)]))

        acc = pl.run_state(values)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(self.barriers.v_free.at[slot])
        return acc, higher, total

    def store(self, acc, top, total, o, lse):
        """o and lse; a row that sees nothing has 0 and +inf."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        nothing = total == 0
        share = jnp.where(nothing, 0.0, 1 / jnp.where(nothing, 1.0, total))
        logs = (top + jnp.log2(jnp.where(nothing, 1.0, total))) * (1 / LOG2E)
        self.shared.lse[self.w] = jnp.where(nothing, jnp.inf, logs)
        self.q[...] = (acc * along(share, acc.shape, 0)).astype(self.q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.q, o)
        plgpu.copy_smem_to_gmem(self.shared.lse.at[self.w], lse)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
