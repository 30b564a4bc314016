"""What the TPU kernels of attention share: products of tiles, windows of a visit, the mask.

A kernel runs over a grid (batch row, query heads in groups, step): a step takes one head of the
group through one visit. `lag` is the visit of so many steps before.

    B batch   T query tokens   S key tokens   N query heads   K key heads   G heads of a group
    H head dim   P visits
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.pallas_tpu_visits import (
    LANES,
    LAST,
    Tiles,
    column,
    pad_last,
    row,
)

__all__ = ["NN", "NT", "Call", "dot", "piece", "view"]

NT, NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))
GROUP = 8  # query heads at most that share the windows of their key head: each has accumulators
VMEM = 48 * 2**20  # of the 64 MiB that 7x has, the least of all


def dot(lhs, rhs, contract):
    """Multiply tiles with an fp32 result; fp32 operands at full precision."""
    precision = jax.lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        lhs, rhs, contract, precision=precision, preferred_element_type=jnp.float32
    )


def piece(size: int) -> int:
    """Cut a block into pieces as wide as the largest matrix unit."""
    return 256 if size % 256 == 0 else LANES


def view(x):
    """[B,T,N,H] -> [B,T,N H], heads side by side in lanes, or [B N,T,H] where H is half of them."""
    shape = view_shape(*x.shape)
    return x.reshape(shape) if x.shape[3] % LANES == 0 else x.swapaxes(1, 2).reshape(shape)


def view_shape(B: int, T: int, N: int, H: int) -> tuple[int, int, int]:
    """Shape of the `view` of an array."""
    return (B, T, N * H) if H % LANES == 0 else (B * N, T, H)


def unview(x, shape):
    """Undo `view`, of a `shape` [B,T,N,H] whose tokens may have been filled up."""
    B, T, N, H = shape
    if H % LANES == 0:
        return x[:, :T].reshape(B, T, N, H)
    return x[:, :T].reshape(B, N, T, H).swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Step:
    """Where in the grid a kernel stands."""

    call: "Call"
    table: jax.Array
    count: jax.Array

    @property
    def b(self):
        return pl.program_id(0)

    @property
    def running(self):
        """Whether there is a visit left; `count` differs between batch rows."""
        return pl.program_id(2) < self.count[self.b] * self.call.group + 1

    def visit(self, lag: int):
        return self.call.place(self.table, self.count, self.b, pl.program_id(2) - lag)[1]

    def head(self, lag: int):
        return self.call.place(self.table, self.count, self.b, pl.program_id(2) - lag)[0]

    def finishes(self, lag: int):
        return (pl.program_id(2) >= lag) & (self.visit(lag) & LAST != 0)


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of one kernel call, and the windows that follow from them."""

    params: object
    tiles: Tiles
    visits: int  # P

    @property
    def exponent(self) -> float:
        return self.params.scale * math.log2(math.e)

    @property
    def group(self) -> int:
        """Query heads of one key head that share its windows."""
        G = self.params.shape_q[2] // self.params.shape_k[2]
        return max(g for g in range(1, GROUP + 1) if G % g == 0)

    @property
    def groups(self) -> int:
        """Groups of one key head."""
        return self.params.shape_q[2] // self.params.shape_k[2] // self.group

    def compiler_params(self):
        semantics = ("parallel", "parallel", "arbitrary")
        return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)

    def offsets(self, offset):
        if offset is not None:
            return offset
        return jnp.full(self.params.shape_q[0], self.params.q_offset, jnp.int32)

    def ids(self, q_ids, kv_ids):
        """[B,1,T] and [B,1,S] of whole blocks: the one row of a window must be all of an axis."""
        sizes = (self.tiles.rows, self.tiles.columns)
        return [pad_last(x, n)[:, None] for x, n in zip((q_ids, kv_ids), sizes, strict=True)]

    def step(self, table, count) -> Step:
        return Step(self, table, count)

    def place(self, table, count, b, step):
        """Head in the group and visit of a step; a step too early or too late is the first or last.

        Windows then stay where they are, and nothing is moved for a step that does nothing.
        """
        step = jnp.clip(step, 0, count[b] * self.group - 1)
        visit = table[b * self.visits + jax.lax.div(step, self.group)]
        return jax.lax.rem(step, self.group), visit

    def _spec(self, lag: int, shape, index):
        """`index(b, group, head in it, visit)` -> index of the window."""

        def at(b, h, step, table, count, _):
            return index(b, h, *self.place(table, count, b, step - lag))

        return pl.BlockSpec(shape, at)

    def _tokens(self, lag: int, size: int, heads: int, block, head):
        """Window on a view: a block of tokens of one head."""
        H = self.params.shape_q[3]
        if H % LANES == 0:
            return self._spec(lag, (1, size, H), lambda b, *at: (b, block(at[2]), head(*at)))
        return self._spec(
            lag, (1, size, H), lambda b, *at: (b * heads + head(*at), block(at[2]), 0)
        )

    def queries(self, lag: int):
        """Window on q, and on all that has its shape."""
        N = self.params.shape_q[2]
        return self._tokens(lag, self.tiles.rows, N, row, self._head)

    def outputs(self, lag: int):
        """Window on o, which moves once a block of queries is done, head after head of a group."""
        N = self.params.shape_q[2]
        return self._tokens(lag, self.tiles.rows, N, row, self._finished)

    def keys(self, lag: int):
        """Window on k and v."""
        K, groups = self.params.shape_k[2], self.groups
        key_head = lambda h, *_: h if groups == 1 else jax.lax.div(h, groups)  # noqa: E731
        return self._tokens(lag, self.tiles.columns, K, column, key_head)

    def key_gradients(self, lag: int):
        """Window on dk and dv, which have a head for every group."""
        heads = self.params.shape_k[2] * self.groups
        return self._tokens(lag, self.tiles.columns, heads, column, lambda h, *_: h)

    def query_rows(self, lag: int):
        """Window on [B,N,1,T]."""
        return self._spec(
            lag,
            (1, 1, 1, self.tiles.rows),
            lambda b, h, g, visit: (b, self._head(h, g, visit), 0, row(visit)),
        )

    def output_rows(self, lag: int):
        """Window on [B,N,1,T] that moves like `outputs`."""
        return self._spec(
            lag,
            (1, 1, 1, self.tiles.rows),
            lambda b, h, g, visit: (b, self._finished(h, g, visit), 0, row(visit)),
        )

    def query_ids(self, lag: int):
        """Window on [B,1,T]."""
        return self._spec(lag, (1, 1, self.tiles.rows), lambda b, h, g, x: (b, 0, row(x)))

    def key_ids(self, lag: int):
        """Window on [B,1,S]."""
        return self._spec(lag, (1, 1, self.tiles.columns), lambda b, h, g, x: (b, 0, column(x)))

    def _head(self, h, g, visit):
        return h * self.group + g

    def _finished(self, h, g, visit):
        # Until then the window waits at the first of them: a window that moves is written.
        return h * self.group + jnp.where(visit & LAST != 0, g, 0)

    def key_columns(self, kv_ids, columns) -> None:
        """Write the ids of a block of keys down the rows of `columns` [S', 128]."""
        for j in range(0, self.tiles.columns, LANES):
            ids = jnp.broadcast_to(kv_ids[0, :, j : j + LANES], (LANES, LANES))
            columns[j : j + LANES] = ids.T

    def seen(self, visit, offset, ids, keys, lanes):
        """Say which keys of a piece of a block pair each query sees, [keys, lanes].

        `ids` are query ids and `key_columns`, or none; `keys` and `lanes` are (start, size).
        """
        tiles, (first, down), (i, across) = self.tiles, keys, lanes
        key = jax.lax.broadcasted_iota(jnp.int32, (down, across), 0)
        query = jax.lax.broadcasted_iota(jnp.int32, (1, across), 1)
        query += row(visit) * tiles.rows + i + offset - column(visit) * tiles.columns - first
        seen = None
        if self.params.causal:
            seen = _both(seen, key <= query)
        if self.params.window is not None:
            seen = _both(seen, key > query - self.params.window)
        if tiles.keys % tiles.columns:
            seen = _both(seen, key < tiles.keys - column(visit) * tiles.columns - first)
        if ids:
            q_ids, columns = ids
            of_keys = columns[pl.ds(first, down)]
            of_keys = jnp.concatenate([of_keys] * (across // LANES), 1)
            seen = _both(seen, of_keys == q_ids[0, :, pl.ds(i, across)])
        return jnp.full((down, across), True) if seen is None else seen


def _both(seen, condition):
    return condition if seen is None else seen & condition
