"""Which blocks of queries and keys the TPU kernels of attention visit, and in which order.

What is seen of a block pair is only known at run time where documents or offsets are, so the list
of visits is an array the kernels prefetch: pairs that see nothing are not in it, pairs that see
everything need no mask. Blocks are compared by the range of their document numbers: a pair whose
ranges overlap is visited, which never misses one and is exact where the numbers ascend.

    B batch   T query tokens   S key tokens   P visits of one batch row and head
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

__all__ = [
    "BORDER",
    "FIRST",
    "LAST",
    "Tiles",
    "column",
    "most_visits",
    "pad",
    "row",
    "tiles_of",
    "visits",
]

LANES = 128
# A visit in one int32: 14 bits of the query block, 14 of the key block, then these.
BORDER, FIRST, LAST = 1, 2, 4
_BITS = 14


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens of a block of queries (`rows`) and of keys (`columns`); static."""

    rows: int
    columns: int
    tokens: int  # T
    keys: int  # S

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return -(-self.tokens // self.rows), -(-self.keys // self.columns)


def tiles_of(params, limit: int) -> Tiles:
    """Cut T and S into as few blocks of at most `limit` as possible, of equal size."""
    T, S = params.shape_q[1], params.shape_k[1]
    return Tiles(_block(T, limit), _block(S, limit), T, S)


def _block(length: int, limit: int) -> int:
    blocks = -(-length // limit)
    return -(-length // (blocks * LANES)) * LANES


def pad(x, multiple: int, axis: int, value=0):
    """Fill an axis up to a multiple; None stays None."""
    if x is None or x.shape[axis] % multiple == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)


def row(visit):
    """Block of queries of a visit."""
    return jax.lax.shift_right_logical(visit, _BITS + 3)


def column(visit):
    """Block of keys of a visit."""
    return jax.lax.shift_right_logical(visit, 3) & (2**_BITS - 1)


def most_visits(params, tiles: Tiles) -> int:
    """P: visits of a batch row that static facts cannot rule out."""
    return len(_pairs(params, tiles, by_keys=False)[0])


def visits(
    params, tiles: Tiles, q_ids, kv_ids, offset, by_keys: bool
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
    """List the visits of every batch row, and how many there are; the rest repeats the last one.

    One block after the other, of keys if `by_keys` or of queries; every block has a visit, so that
    its result is written even if it is zero. FIRST and LAST mark its first and last one, BORDER a
    pair that needs the mask.
    """
    i, j = _pairs(params, tiles, by_keys)
    seen, whole = _seen(params, tiles, i, j, q_ids, kv_ids, offset)
    seen, whole = (jnp.broadcast_to(x, (params.shape_q[0], len(i))) for x in (seen, whole))
    major = j if by_keys else i
    opens = np.diff(major, prepend=-1) != 0
    some = jnp.zeros((seen.shape[0], int(major[-1]) + 1), bool).at[:, major].max(seen)
    kept = seen | (opens & ~some[:, major])
    count = kept.sum(1, dtype=jnp.int32)
    order = jnp.argsort(~kept, axis=1, stable=True).astype(jnp.int32)
    at = jnp.minimum(jnp.arange(len(i), dtype=jnp.int32)[None], count[:, None] - 1)
    order = jnp.take_along_axis(order, at, 1)
    whole = jnp.take_along_axis(whole, order, 1)
    i, j, major = (jnp.asarray(x, jnp.int32)[order] for x in (i, j, major))
    change = major[:, 1:] != major[:, :-1]
    first = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
    last |= at == count[:, None] - 1
    flags = ((~whole, BORDER), (first, FIRST), (last, LAST))
    flags = sum(jnp.where(holds, jnp.int32(flag), 0) for holds, flag in flags)
    return (i << (_BITS + 3)) | (j << 3) | flags, count


def _pairs(params, tiles: Tiles, by_keys: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that can see something as far as static facts say, and one for a block that cannot."""
    i, j = np.indices(tiles.counts, np.int32)
    can = np.ones(i.shape, bool)
    if params.causal and params.q_offset is not None:
        first = i * tiles.rows + params.q_offset
        can = j * tiles.columns < first + tiles.rows
        if params.window is not None:
            can &= first - (j + 1) * tiles.columns + 1 < params.window
    if by_keys:
        can[-1, ~can.any(0)] = True
        return i.T[can.T], j.T[can.T]
    can[~can.any(1), 0] = True
    return i[can], j[can]


def _seen(params, tiles: Tiles, i, j, q_ids, kv_ids, offset):
    """Whether a pair sees anything, and whether it sees everything: bool [B, P], or [1, P]."""
    start = jnp.int32(params.q_offset) if offset is None else offset[:, None]
    first, last = i * tiles.rows, np.minimum((i + 1) * tiles.rows, tiles.tokens) - 1
    left, right = j * tiles.columns, np.minimum((j + 1) * tiles.columns, tiles.keys) - 1
    nearest, farthest = (first + start) - right, (last + start) - left  # distance of query and key
    nearest, farthest = jnp.atleast_2d(nearest), jnp.atleast_2d(farthest)
    seen = jnp.ones(nearest.shape, bool)
    whole = seen & ((j + 1) * tiles.columns <= tiles.keys)
    if params.causal:
        seen, whole = seen & (farthest >= 0), whole & (nearest >= 0)
    if params.window is not None:
        seen, whole = seen & (nearest < params.window), whole & (farthest < params.window)
    if q_ids is not None:
        q_low, q_high = _range(q_ids, tiles.rows)
        k_low, k_high = _range(kv_ids, tiles.columns)
        q_low, q_high, k_low, k_high = q_low[:, i], q_high[:, i], k_low[:, j], k_high[:, j]
        seen = seen & (q_low <= k_high) & (k_low <= q_high)
        whole = whole & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return seen, whole


def _range(ids, size: int):
    """Smallest and largest number of every block, [B, blocks]."""
    ids = pad_last(ids, size)
    ids = ids.reshape(ids.shape[0], -1, size)
    return ids.min(2), ids.max(2)


def pad_last(ids, size: int):
    """Fill ids up to whole blocks with the last one, so that ranges stay what they are."""
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % size)), mode="edge")
