"""How the TPU kernels cut their operands, and the gates they are handed.

A block is one chunk of several heads, side by side in the lanes of [B, T, heads * dim]: nothing is
transposed in HBM, and a head is a slice of lanes.

Gates come as columns, to scale rows, and as rows, to scale columns, with c = cumulative g inside
the chunk and masks of documents as in the README:

    DECAY c     BETA -beta     READ a = exp(c_i)     WRITE z beta = beta_i exp(c_C - c_i)
    KEEP  y = exp(c_C), along the whole row

    B batch   T tokens   K key heads   R value heads   J blocks of heads   N value heads of a block
    M key heads of a block   Z chunks   C rows of a chunk   H key dim   E value dim
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MAX_HEADS = 8  # of a block; they run in step, and are the sublanes of a register
LANES = 128

DECAY, BETA, WRITE, KEEP = range(4)  # rows
COLUMNS = COLUMN_DECAY, COLUMN_READ, COLUMN_WRITE = range(3)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one call. The last block of heads may reach beyond them."""

    batch: int
    chunks: int
    chunk: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    heads: int
    keys: int
    reverse: bool = False  # chunks from the last to the first

    @property
    def count(self) -> int:
        return pl.cdiv(self.value_heads, self.heads)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.count, self.chunks

    def key_of(self, head: int) -> int:
        """Key head of a value head, both counted in the block."""
        return head * self.keys // self.heads

    def _chunk(self, n):
        return self.chunks - 1 - n if self.reverse else n

    @property
    def sharing(self) -> int:
        """Blocks of value heads that share one key head; 1 where a block has its own."""
        return max(1, self.value_heads // self.key_heads // self.heads)

    def _key_block(self, j):
        return jax.lax.div(j, jnp.int32(self.sharing)) if self.sharing > 1 else j

    def of_keys(self) -> pl.BlockSpec:
        """[B, T, K H]"""
        shape = (1, self.chunk, self.keys * self.key_dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, self._chunk(n), self._key_block(j)))

    def of_key_sums(self) -> pl.BlockSpec:
        """[B, T, J M H], what every block adds to the gradients of its key heads."""
        shape = (1, self.chunk, self.keys * self.key_dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, self._chunk(n), j))

    def of_values(self) -> pl.BlockSpec:
        """[B, T, R E]"""
        shape = (1, self.chunk, self.heads * self.value_dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, self._chunk(n), j))

    def of_columns(self) -> pl.BlockSpec:
        """[B, J, T, 3 N]"""
        shape = (1, 1, self.chunk, len(COLUMNS) * self.heads)
        return pl.BlockSpec(shape, lambda b, j, n: (b, j, self._chunk(n), 0))

    def of_runs(self) -> list[pl.BlockSpec]:
        """[B, T, 1] and [B, Z, 1, C]"""
        return [
            pl.BlockSpec((1, self.chunk, 1), lambda b, j, n: (b, self._chunk(n), 0)),
            pl.BlockSpec((1, 1, 1, self.chunk), lambda b, j, n: (b, self._chunk(n), 0, 0)),
        ]

    def of_state(self) -> pl.BlockSpec:
        """[B, R, H, E]"""
        shape = (1, self.heads, self.key_dim, self.value_dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, j, 0, 0))

    def of_rows(self, kinds: int, size: int) -> pl.BlockSpec:
        """[B, J, Z, kinds, N, size]"""
        shape = (1, 1, 1, kinds, self.heads, size)
        return pl.BlockSpec(shape, lambda b, j, n: (b, j, self._chunk(n), 0, 0, 0))

    def of_chunk(self, *tile: int) -> pl.BlockSpec:
        """[Z, B, R, *tile]"""
        shape = (1, 1, self.heads, *tile)
        return pl.BlockSpec(shape, lambda b, j, n: (self._chunk(n), b, j, 0, 0))

    def compiler_params(self, dtype) -> pltpu.CompilerParams:
        """Cores share rows and heads; chunks follow each other. fp32 blocks need more VMEM."""
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=32 << 20 if dtype == jnp.float32 else None,
        )

    def scratch(self) -> list:
        """The state, or its gradient, and the mask of pairs."""
        return [
            pltpu.VMEM((self.heads, self.key_dim, self.value_dim), jnp.float32),
            pltpu.VMEM((self.chunk, self.chunk), jnp.float32),
        ]


class Gates(NamedTuple):
    columns: Array
    rows: Array
    runs: tuple[Array, ...]  # as a column and as rows, or nothing
    z: Array  # exp(c_C - c_i)  [B, J, Z, N, C]; no kernel reads it


def head_blocks(key_heads: int, value_heads: int, dims: tuple[int, int]) -> tuple[int, int] | None:
    """Choose (value heads, key heads) of a block, or None where no block fits.

    Lanes of a block are a multiple of 128 or all there are. Few blocks first, then few heads.
    """
    group = value_heads // key_heads
    for count in range(pl.cdiv(value_heads, MAX_HEADS), value_heads + 1):
        for heads in range(pl.cdiv(value_heads, count), MAX_HEADS + 1):
            keys = max(1, heads // group)
            sizes = ((keys, key_heads, dims[0]), (heads, value_heads, dims[1]))
            fits = all(n == total or n * dim % LANES == 0 for n, total, dim in sizes)
            if fits and (heads % group == 0 or group % heads == 0):
                return heads, keys
    return None


def cut(params, reverse: bool = False) -> Blocks:
    """Sizes of the call that `params` describes."""
    (B, T, K, H), (R, E) = params.shape_q, params.shape_v[2:]
    heads, keys = head_blocks(K, R, (H, E))
    C = params.config.chunk
    return Blocks(B, pl.cdiv(T, C), C, K, R, H, E, heads, keys, reverse)


def flat(x: Array, chunk: int) -> Array:
    """[B, T, heads, dim] -> [B, Z C, heads * dim], filled with zeros."""
    x = x.reshape(*x.shape[:2], -1)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), (0, 0)))


def gates(blocks: Blocks, g: Array, beta: Array, runs: Array | None) -> Gates:
    """Arrange the gates [B, T, R] and the document numbers for the kernels.

    Rows added to a chunk have beta = 0 and g = 0 and belong to the last document.
    """
    B, J, N, Z, C = blocks.batch, blocks.count, blocks.heads, blocks.chunks, blocks.chunk

    def chunks(x):  # [B, T, R] -> [B, J, Z, N, C]
        x = jnp.pad(x, ((0, 0), (0, Z * C - x.shape[1]), (0, J * N - x.shape[2])))
        return x.reshape(B, Z, C, J, N).transpose(0, 3, 1, 4, 2)

    c, beta = jnp.cumsum(chunks(g), -1), chunks(beta)
    end = c[..., -1:]
    read, write, keep = c, end - c, end
    run_operands = ()
    if runs is not None:
        run = jnp.pad(runs, ((0, 0), (0, Z * C - runs.shape[1])), mode="edge").reshape(B, Z, C)
        last = run[..., -1:]
        before = jnp.concatenate([run[:, :1, :1], last[:, :-1]], 1)

        def inside(same, exponent):
            return jnp.where(same[:, None, :, None], exponent, -jnp.inf)

        read, write = inside(run == before, read), inside(run == last, write)
        keep = inside(last == before, keep)
        run_operands = run.reshape(B, Z * C, 1), run[:, :, None]
    z = jnp.exp(write)
    rows = jnp.stack([c, -beta, z * beta, jnp.broadcast_to(jnp.exp(keep), c.shape)], 3)
    columns = jnp.concatenate([c, jnp.exp(read), z * beta], 3).swapaxes(3, 4)
    return Gates(columns.reshape(B, J, Z * C, -1), rows, run_operands, z)


def tokens(x: Array, shape: tuple[int, int, int]) -> Array:
    """[B, J, Z, N, C] -> [B, T, R]"""
    B, T, R = shape
    return x.transpose(0, 2, 4, 1, 3).reshape(B, x.shape[2] * x.shape[4], -1)[:, :T, :R]
