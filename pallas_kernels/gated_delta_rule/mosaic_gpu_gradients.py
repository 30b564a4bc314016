"""The parallel half of the gated delta rule's backward on Hopper: chunks in any order.

From the states S, the inverse X and what the sweep leaves, dS+ and dR~ (letters of the README):

    R   = V - a K S                     V'  = X (beta R)             P = s tril(Q K^T * D)
    dP  = tril(dO V'^T)                 dA  = -tril(dR~ V'^T, -1)    B = tril(K K^T * D, -1)
    dQ1 = s a dO S^T                    dQ  = dQ1 + (s dP * D) K
    dK1 = z V' dS+^T                    dK2 = -a beta dR~ S^T        Y = beta (dA * D)
    dK  = dK1 + dK2 + (s dP * D)^T Q + (Y + Y^T) K                   dV = beta dR~
    E   = dP * P + beta dA * B          dbeta = rowsum(dR~ * R) + rowsum(dA * B)

A block of 128 dims fills the shared memory of a processor. So it takes several chunks, one after
another, and fetches the next one while it computes.

A warpgroup takes 64 columns of everything as wide as a head; of the [C,C] products the first one
takes dP's, the last one dA's. Sums over the rows of a tile pass through shared memory that Mosaic
gives to the block, not to the warpgroup: they take turns.

    B batch   Z chunks   C = 64 rows of a chunk   K key heads   R value heads
    H key dim = E value dim   W warpgroups, H / 64
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import BETA, CUMULATIVE, READ, RUN, WRITE
from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import (
    PROCESSORS,
    TILE,
    add_products,
    decay,
    indices,
    load,
    load_row,
    products,
)
from pallas_kernels.hopper import hidden_zero, matrix, parameters, slot_of

# The sums: rowsum(E) + rowsum(Q * dQ1) + rowsum(K * dK2), colsum(E), rowsum(K * dK1), dbeta, all
# by rows of the chunk, and <S, dS+> by rows of S.
OF_ROWS, OF_COLUMNS, WRITTEN, DBETA, KEPT = range(5)
SLOTS = 2


def block_length(chunks: int, heads: int) -> int:
    """Chunks that a block computes one after another, so that all are done soonest."""

    def duration(length):  # of the processors' turns, each with a chunk's time to begin with
        return -(-(-(-chunks // length) * heads) // PROCESSORS) * (length + 1)

    return min(range(1, chunks + 1), key=duration)


def gradients(scale, q, k, v, do, gates, t_inv, states, dstates, dr):
    """Return dq, dk, dv [B,Z*C,R,H] and fp32 sums [Z,B,R,W,5,C], each to be summed over W.

    Arguments as the sweep takes and leaves them; dq and dk are per value head.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    H, dtype = q.shape[3], q.dtype
    W, groups = H // TILE, R // q.shape[2]
    # Blocks of one warpgroup are small enough for several at a time, which hide what they wait for.
    length = block_length(Z, B * R) if W > 1 else 1

    def body(*refs):
        sources, results, scratch = refs[:9], refs[9:13], refs[13:]
        p, b, r, w = (jax.lax.axis_index(n) for n in ("part", "batch", "head", "columns"))
        first = p * length
        chunks = jnp.minimum(length, Z - first) if length > 1 else 1
        block = _Block(sources, results, *scratch, b, r, jax.lax.div(r, jnp.int32(groups)), C)
        pl.when(w == 0)(lambda: block.begin(first, chunks))

        @pl.loop(0, chunks)
        def _(i):
            _chunk(scale, block, first + i, i, chunks, w, W)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys, square, pairs = (matrix(dtype, 1, *x) for x in ((C, H), (H, H), (C, C)))
    return plgpu.kernel(
        body,
        out_type=(
            *[jax.ShapeDtypeStruct((B, Z * C, R, H), dtype)] * 3,
            jax.ShapeDtypeStruct((Z, B, R, W, 5, C), jnp.float32),
        ),
        scratch_types=[
            [
                matrix(dtype, SLOTS, C, H),
                matrix(dtype, SLOTS, H, H),
                plgpu.SMEM((SLOTS, rows, C), jnp.float32),
            ],
            [pairs, keys, keys, keys, keys, square],
            [pairs, pairs, plgpu.SMEM((1, W, 5, C), jnp.float32)],
            [
                plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
                plgpu.Barrier(num_arrivals=3),
                plgpu.Barrier(num_arrivals=3),
                plgpu.Barrier(num_arrivals=W),
                plgpu.Barrier(num_arrivals=1),
            ],
        ],
        grid=(R, -(-Z // length), B),
        grid_names=("head", "part", "batch"),
        num_threads=W,
        thread_name="columns",
        kernel_name="gdn_gradients",
        compiler_params=parameters(),
    )(k, states, gates, t_inv, v, dr, q, do, dstates)


def _chunk(scale, block, z, i, chunks, w, W):
    """One chunk: wait for what was fetched, compute, give back, and fetch for the ones to come."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    early, needed, rest, met, turn = block.barriers
    slot = slot_of(i, SLOTS)
    only = hidden_zero(block.r, i)
    late = (s.at[only] for s in (*block.late, *block.computed))
    x = _Chunk(*(s.at[slot] for s in block.early), *late, _own(w), w)

    def meet():
        plgpu.commit_smem()
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)

    plgpu.barrier_wait(early.at[slot])
    plgpu.barrier_wait(needed)
    dbeta = _correct(x)
    meet()
    more = i + 1 < chunks
    pl.when((w == 0) & more)(lambda: block.fetch_inverse(z + 1))
    plgpu.barrier_wait(rest)
    _pairs(x, scale, dbeta, W, turn)
    _keep(x, W)
    meet()
    dq_own, of_rows = _of_queries(x, scale)
    dk_own = _of_keys(x, of_rows)
    meet()  # all have read what the results overwrite
    x.v[:, x.own] = (load_row(x.gates.at[BETA]) * load(x.dr.at[:, x.own])).astype(x.k.dtype)
    x.do[:, x.own] = dq_own
    x.k[:, x.own] = dk_own
    meet()

    @pl.when(w == 0)
    def _():
        block.store(x, z)
        pl.when(more)(lambda: block.fetch_free(z + 1))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(more)(lambda: block.fetch_stored(z + 1))
        pl.when(i + SLOTS < chunks)(lambda: block.fetch_early(z + SLOTS, slot))


def _own(w):
    from jax.experimental import pallas as pl

    return pl.ds(w * TILE, TILE)


class _Block(NamedTuple):
    """What a block reads and writes in device memory, its shared memory, and where it stands.

    `early` is fetched two chunks ahead. There is no room for two of the others: each is fetched as
    soon as the chunk before has read it, or has stored the result that took its place.
    """

    sources: Any  # k, states, gates | t_inv, v, dr | q, do, dstates
    results: Any  # dq, dk, dv, sums
    early: Any  # of two chunks: k, state, gates
    late: Any  # t_inv, v, dr, q, do, dstate
    computed: Any
    barriers: Any
    b: Any
    r: Any
    key_head: Any
    C: int

    def _tokens(self, z, head):
        from jax.experimental import pallas as pl

        return self.b, pl.ds(z * self.C, self.C), head

    def _fetch(self, z, *numbers):
        """By their place among the `sources` behind the early ones."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        of_head, tokens = (z, self.b, self.r), self._tokens(z, self.r)
        places = of_head, tokens, of_head, self._tokens(z, self.key_head), tokens, of_head
        for n in numbers:
            source, barrier = self.sources[3 + n].at[places[n]], self.barriers[1 + n // 3]
            plgpu.copy_gmem_to_smem(source, self.late[n].at[0], barrier)

    def begin(self, first, chunks):
        from jax.experimental import pallas as pl

        self.fetch_early(first, 0)
        self._fetch(first, *range(6))
        pl.when(chunks > 1)(lambda: self.fetch_early(first + 1, 1))

    def fetch_early(self, z, slot):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        places = self._tokens(z, self.key_head), *[(z, self.b, self.r)] * 2
        for source, place, target in zip(self.sources[:3], places, self.early, strict=True):
            barrier = self.barriers[0].at[slot]
            plgpu.copy_gmem_to_smem(source.at[place], target.at[slot], barrier)

    def fetch_inverse(self, z):
        self._fetch(z, 0)

    def fetch_free(self, z):
        self._fetch(z, 2, 3, 5)

    def fetch_stored(self, z):
        self._fetch(z, 1, 4)

    def store(self, x, z):
        from jax.experimental.pallas import mosaic_gpu as plgpu

        dq, dk, dv, sums = self.results
        for result, target in ((x.do, dq), (x.k, dk), (x.v, dv)):
            plgpu.copy_smem_to_gmem(result, target.at[self._tokens(z, self.r)])
        plgpu.copy_smem_to_gmem(x.sums, sums.at[z, self.b, self.r])


class _Chunk(NamedTuple):
    """One chunk in shared memory: what is read, what is computed, and a warpgroup's columns."""

    k: Any  # [C,H]
    state: Any  # [H,H]
    gates: Any  # [6,C]
    t_inv: Any  # [C,C]
    v: Any  # [C,H]  V, then V'
    dr: Any  # [C,H]  dR~
    q: Any  # [C,H]
    do: Any  # [C,H]
    dstate: Any  # [H,H]  dS+^T
    dqk: Any  # [C,C]  s dP * D
    y: Any  # [C,C]
    sums: Any  # [W,5,C]
    own: Any
    w: Any


def _correct(x):
    """Replace V by V' and return rowsum(dR~ * R)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    v = x.v.at[:, x.own]
    (k_state,) = products([(x.k, x.state.at[:, x.own])])
    rest = load(v) - load_row(x.gates.at[READ]) * k_state
    v[...] = (load_row(x.gates.at[BETA]) * rest).astype(x.k.dtype)
    plgpu.commit_smem()
    (v_new,) = products([(x.t_inv, v)])
    plgpu.commit_smem()  # all warps have read v
    v[...] = v_new.astype(x.k.dtype)
    return jnp.sum(load(x.dr.at[:, x.own]) * rest, axis=1)


def _pairs(x, scale, dbeta, warpgroups, turn):
    """Store s dP * D and Y, and what E and dA * B add to the sums."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def add(e, dbeta):
        x.sums[x.w, OF_ROWS] = jnp.sum(e, axis=1)
        x.sums[x.w, OF_COLUMNS] = jnp.sum(e, axis=0)
        x.sums[x.w, DBETA] = dbeta

    if warpgroups == 1:
        e, of_pairs = _key_pairs(x)
        add(_query_pairs(x, scale) + e, dbeta + of_pairs)
        return

    @pl.when(x.w == 0)
    def _():
        add(_query_pairs(x, scale), dbeta)
        plgpu.barrier_arrive(turn)

    @pl.when(x.w == warpgroups - 1)
    def _():
        e, of_pairs = _key_pairs(x)
        plgpu.barrier_wait(turn)
        add(e, dbeta + of_pairs)


def _query_pairs(x, scale):
    """Store s dP * D, return dP * P."""
    dp, scores = products([(x.do, x.v.T)], [(x.q, x.k.T)])
    dqk = scale * dp * decay(x.gates.at[CUMULATIVE], x.gates.at[RUN])
    x.dqk[...] = dqk.astype(x.k.dtype)
    return dqk * scores


def _key_pairs(x):
    """Store Y, return dA * A and rowsum(dA * B)."""
    dr_v, pairs = products([(x.dr, x.v.T)], [(x.k, x.k.T)])
    i, j = indices()
    da = jnp.where(i > j, -decay(x.gates.at[CUMULATIVE], x.gates.at[RUN]) * dr_v, 0.0)
    y = load_row(x.gates.at[BETA]) * da
    x.y[...] = y.astype(x.k.dtype)
    return y * pairs, jnp.sum(da * pairs, axis=1)


def _of_queries(x, scale):
    """Return dQ and rowsum(Q * dQ1)."""
    (do_state,) = products([(x.do, x.state.at[x.own].T)])
    state = scale * load_row(x.gates.at[READ]) * do_state
    of_rows = jnp.sum(load(x.q.at[:, x.own]) * state, axis=1)
    return add_products(state, (x.dqk, x.k.at[:, x.own])).astype(x.k.dtype), of_rows


def _of_keys(x, of_rows):
    """Return dK; store rowsum(K * dK1) and add rowsum(K * dK2) and `of_rows` to their sum."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    k = x.k.at[:, x.own]
    dr_state, v_dstate = products([(x.dr, x.state.at[x.own].T)], [(x.v, x.dstate.at[:, x.own])])
    read = -load_row(x.gates.at[READ]) * load_row(x.gates.at[BETA]) * dr_state
    write = load_row(x.gates.at[WRITE]) * v_dstate
    of_pairs = plgpu.load(x.sums.at[x.w, OF_ROWS], layout=plgpu.Layout.WGMMA.reduce(1))
    x.sums[x.w, OF_ROWS] = of_pairs + of_rows + jnp.sum(load(k) * read, axis=1)
    x.sums[x.w, WRITTEN] = jnp.sum(load(k) * write, axis=1)
    dk = add_products(read + write, (x.dqk.T, x.q.at[:, x.own]), (x.y, k), (x.y.T, k))
    return dk.astype(x.k.dtype)


def _keep(x, warpgroups):
    """Store <S, dS+>."""
    from jax.experimental import pallas as pl

    parts = [pl.ds(i * TILE, TILE) for i in range(warpgroups)]
    kept = [load(x.state.at[x.own, i]) * load(x.dstate.at[i, x.own].T) for i in parts]
    x.sums[x.w, KEPT] = jnp.sum(functools.reduce(jnp.add, kept), axis=1)
