"""The states before the segments of a sequence on Hopper, so that segments run at the same time.

A segment is an affine map of the state, S -> M S + F. Transposed, its rows do not mix: those of F^T
are the recurrence from 0, those of M^T the recurrence of the identity with V = 0. One kernel runs
both for all segments at once, without outputs; `fold` applies the maps one after another.

Backward a segment is the map dS -> M^T dS + D, with the same M; D is the sweep from 0.

Where gates decay fast, a segment's end feels only its last chunks, and its start only the gradients
of its first ones: with beta |k|^2 <= 2 no step makes a state longer, so what is FORGOTTEN after its
decay is nothing in fp32. `reach` counts the chunks that are not; the others are not walked over.

    B batch   Z chunks   C rows of a chunk   K key heads   R value heads   H = E dims
    N segments of L chunks   W warpgroups of rows, H / 64
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import tuned
from pallas_kernels.gated_delta_rule.mosaic_gpu_fold import fold
from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import BETA, KEEP, READ, WRITE
from pallas_kernels.gated_delta_rule.mosaic_gpu_sweep import sweep
from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import (
    PROCESSORS,
    TILE,
    add_products,
    load,
    load_column,
    products,
)
from pallas_kernels.hopper import matrix, parameters, slot_of

SLOTS = 3
APPLY = 1  # what a map costs, in chunks of the recurrence
FORGOTTEN = 2.0**-64


def count_segments(heads: int, chunks: int, dim: int) -> int:
    """Segments for `heads` independent recurrences: the number with the shortest chain of chunks.

    Blocks that do not fit on the chip together wait for each other. The last segment needs no map,
    the first one no M.
    """
    return _count(heads, chunks, dim, lambda n: (2 * n - 3,))


def count_sweeps(heads: int, chunks: int, dim: int) -> int:
    """The same of the sweep. The first segment needs no map, the last one no M; D takes a kernel
    of its own."""
    return _count(heads, chunks, dim, lambda n: (n - 1, n - 2))


def _count(heads, chunks, dim, maps) -> int:
    """`maps(n)` are the segments that each kernel before the last one walks over."""
    blocks = PROCESSORS * 128 // dim  # at the same time

    def chain(n):
        length = -(-chunks // n)
        waves = sum(-(-m * heads // blocks) for m in maps(n)) if n > 1 else 0
        return length * (1 + waves) + APPLY * (n > 1) * (n + 1)

    return of_one_length(min(range(1, most_segments(heads, chunks, dim) + 1), key=chain), chunks)


def most_segments(heads: int, chunks: int, dim: int) -> int:
    """As many as run at the same time; 1 where heads alone fill the chip."""
    return max(1, min(PROCESSORS * 128 // dim // heads, chunks))


def of_one_length(segments: int, chunks: int) -> int:
    """How many are left of so many where each is as long as the longest."""
    return -(-chunks // -(-chunks // segments))


MODEL = {"forward": count_segments, "backward": count_sweeps}


def choose_segments(of: str, config, heads: int, chunks: int, dim: int) -> int:
    """What the caller asks for, else what was measured best on the device, else the model's."""
    if config.segments is not None:
        asked = config.segments[tuned.PASSES.index(of)]
    else:
        asked = tuned.segments(of, heads, chunks, dim) or MODEL[of](heads, chunks, dim)
    return of_one_length(asked, chunks)


def segment_starts(k, v, gates, t_inv, start, segments):
    """Return the transposed states before the segments [N,B,R,E,H], fp32, from start [B,R,E,H].

    k [B,Z*C,K,H], v [B,Z*C,R,E], gates [Z,B,R,6,C] fp32, t_inv [Z,B,R,C,C].
    """
    if segments == 1:
        return start[None]
    felt = reach(gates[..., KEEP, 0], segments)
    maps = _maps(k, v, gates, t_inv, start, felt, segments, range(2 * segments - 3))
    if segments > 2:
        maps = fold(maps, maps, segments - 1, segments - 1, k.dtype, backward=False)
    return jnp.concatenate([start[None], maps])


def segment_ends(scale, q, k, do, gates, t_inv, end, segments):
    """Return dS^T behind the segments [N,B,R,E,H], fp32, from end [B,R,E,H]; more in `sweep`."""
    if segments == 1:
        return end[None]
    N, length = segments, -(-gates.shape[0] // segments)
    none = jnp.zeros((N - 2, *end.shape), end.dtype)
    behind = jnp.concatenate([none, end[None]])
    keep = gates[..., KEEP, 0]
    at_starts = reach(keep, N, backward=True)[1:]
    (added,) = sweep(scale, q, k, do, gates, t_inv, behind, length, at_starts)
    if N > 2:  # M does not depend on v
        at_ends = reach(keep, N)
        factors = _maps(k, do, gates, t_inv, end, at_ends, N, range(N - 1, 2 * N - 3))
        added = fold(added, factors, N - 1, 0, k.dtype, backward=True)
    return jnp.concatenate([added, end[None]])


def reach(keep, segments, backward=False):
    """Return how many of a segment's last chunks its end feels [N,B,R].

    With `backward` it is how many of its first ones the gradient at its start is made of. It is
    one more than a segment has chunks where what comes from beyond its other end is felt too.
    keep [Z,B,R] is what is left of a state behind each chunk.
    """
    length = -(-keep.shape[0] // segments)
    rest = segments * length - keep.shape[0]  # chunks that the last segment lacks
    keep = jnp.pad(keep, ((0, rest), (0, 0), (0, 0)), constant_values=1.0)
    logs = jnp.log(keep).reshape(segments, length, *keep.shape[1:])
    i, j = jnp.arange(length + 1)[:, None], jnp.arange(length)
    passed = j < i if backward else j >= i
    left = jnp.sum(jnp.where(passed[:, :, None, None], logs[:, None], 0.0), 2)
    return jnp.sum(left >= math.log(FORGOTTEN), 1, dtype=jnp.int32)


def _maps(k, v, gates, t_inv, start, felt, N, which):
    """[len(which),B,R,H,H] fp32, of these: F^T of segments 0 ... N-2, the first from `start`, and
    M^T of segments 1 ... N-2. `felt` [N,B,R] is their `reach`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    K, H = k.shape[2:]
    W, L = H // TILE, -(-Z // N)
    dtype = k.dtype

    def body(*refs):
        sources, (start, felt, maps, shared, barriers) = refs[:4], refs[4:]
        b, r, n, w = (jax.lax.axis_index(x) for x in ("batch", "head", "map", "rows"))
        m, own = n + which.start, pl.ds(w * TILE, TILE)
        is_factor = m >= N - 1
        segment = jnp.where(is_factor, m - (N - 2), m)
        chunks = felt[segment, b, r]
        whole = chunks > L
        chunks = jnp.minimum(jnp.where(is_factor & jnp.logical_not(whole), 0, chunks), L)
        place = b, r, jax.lax.div(r, jnp.int32(R // K)), w, own
        walk = _Walk(
            sources, shared, *barriers, *place, (segment + 1) * L - chunks, chunks, is_factor
        )
        walk.begin()
        given = plgpu.load(start.at[b, r, own], layout=plgpu.Layout.WGMMA, optimized=False)
        given = jnp.where(whole & (m == 0), given, 0.0)
        state = jnp.where(whole & is_factor, _identity(w, H), given)
        maps[n, b, r, own] = jax.lax.fori_loop(0, chunks, walk.chunk, state)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(which), B, R, H, H), jnp.float32),
        scratch_types=[
            [
                *(matrix(dtype, SLOTS, C, x) for x in (H, H, C)),
                plgpu.SMEM((SLOTS, rows, C), jnp.float32),
            ],
            [
                plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
                plgpu.Barrier(num_arrivals=W, num_barriers=SLOTS),
            ],
        ],
        grid=(R, B, len(which)),
        grid_names=("head", "batch", "map"),
        num_threads=W,
        thread_name="rows",
        compiler_params=parameters(),
        kernel_name="gdn_segment_maps",
    )
    return kernel(k, v, t_inv, gates, start, felt)


def _identity(w, H):
    """A warpgroup's rows of it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (TILE, H), axis, layout=plgpu.Layout.WGMMA)
        for axis in (0, 1)
    )
    return jnp.where(row + w * TILE == column, 1.0, 0.0)


class _Walk(NamedTuple):
    """One warpgroup's walk over a segment, without outputs."""

    sources: Any  # k, v, t_inv, gates in device memory
    shared: Any  # the same of three chunks
    full: Any
    free: Any
    b: Any
    r: Any
    key_head: Any
    w: Any
    own: Any
    first: Any
    chunks: Any
    is_factor: Any

    def fetch(self, z, slot):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        C = self.shared[0].shape[1]
        tokens, of_head = pl.ds(z * C, C), (z, self.b, self.r)
        places = (self.b, tokens, self.key_head), (self.b, tokens, self.r), of_head, of_head
        for source, place, target in zip(self.sources, places, self.shared, strict=True):
            plgpu.copy_gmem_to_smem(source.at[place], target.at[slot], self.full.at[slot])

    def begin(self):
        from jax.experimental import pallas as pl

        for slot in range(SLOTS):

            @pl.when((self.w == 0) & (slot < self.chunks))
            def _(slot=slot):
                self.fetch(self.first + slot, slot)

    def chunk(self, i, state):
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        slot = slot_of(i, SLOTS)
        plgpu.barrier_wait(self.full.at[slot])
        k_i, v_i, t_i, gate_i = (x.at[slot] for x in self.shared)
        dtype = k_i.dtype
        (read,) = products([(state.astype(dtype), k_i.T)])
        given = jnp.where(self.is_factor, 0.0, load(v_i.at[:, self.own].T))
        left = load_column(gate_i.at[BETA]) * (given - load_column(gate_i.at[READ]) * read)
        (v_new,) = products([(left.astype(dtype), t_i.T)])
        added = (load_column(gate_i.at[WRITE]) * v_new).astype(dtype)
        state = add_products(gate_i[KEEP, 0] * state, (added, k_i))

        @pl.when(i + SLOTS < self.chunks)
        def _():
            plgpu.barrier_arrive(self.free.at[slot])

            @pl.when(self.w == 0)
            def _():
                plgpu.barrier_wait(self.free.at[slot])
                self.fetch(self.first + i + SLOTS, slot)

        return state
