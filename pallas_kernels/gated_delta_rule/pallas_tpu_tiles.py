"""What the TPU kernels of the gated delta rule do with tiles: products, heads, gates of pairs.

The compiler keeps the order in which a kernel's text issues matrix products: one that waits for
another holds up all that follow. So kernels go stage by stage, each for all heads, and no product
of a stage reads the result of another one of the same stage.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.pallas_tpu_blocks import COLUMN_DECAY, DECAY, Blocks

NT = (1, 1)  # contract the columns of both: the matrix unit takes its right operand transposed
TN = (0, 0)


def dot(lhs, rhs, contract: tuple[int, int] = (1, 0)):
    """Contract two tiles of one dtype into fp32; fp32 operands at full precision."""
    precision = jax.lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        lhs,
        rhs,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def split(x, exact: bool) -> tuple:
    """fp32 -> (x,), or two bf16 parts whose sum is x to 16 bits."""
    if exact:
        return (x,)
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def split_dot(lhs: tuple, rhs: tuple):
    """Multiply split tiles; the product of the two low parts is below the error of the rest."""
    if len(lhs) == 1:
        return dot(lhs[0], rhs[0])
    return dot(lhs[0], rhs[0]) + dot(lhs[0], rhs[1]) + dot(lhs[1], rhs[0])


def lanes(shape: tuple[int, int]):
    """Number of each lane, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


@dataclasses.dataclass(frozen=True)
class Step:
    """The refs of one grid step that forward and backward share, read by value head."""

    blocks: Blocks
    q: Any  # [1, C, M H]
    k: Any
    columns: Any  # [1, 1, C, 3 N]
    rows: Any  # [1, 1, 1, 4, N, C]
    mask: Any  # [C, C] scratch

    @property
    def heads(self) -> range:
        return range(self.blocks.heads)

    def keys(self, h: int):
        """K [C, H]"""
        return head(self.k, self.blocks.key_of(h), self.blocks.key_dim)

    def keys_and_queries(self, h: int):
        """[K; Q] [2C, H]"""
        queries = head(self.q, self.blocks.key_of(h), self.blocks.key_dim)
        return jnp.concatenate([self.keys(h), queries])

    def products(self) -> list:
        """[K K^T; Q K^T] [2C, C], one product for the value heads that share a key head."""
        of_keys = {}
        for h in self.heads:
            if (m := self.blocks.key_of(h)) not in of_keys:
                of_keys[m] = dot(self.keys_and_queries(h), self.keys(h), NT)
        return [of_keys[self.blocks.key_of(h)] for h in self.heads]

    def column(self, kind: int, h: int):
        """[C, 1]"""
        at = kind * self.blocks.heads + h
        return self.columns[0, 0, :, at : at + 1]

    def row(self, kind: int, h: int):
        """[1, C]"""
        return self.rows[0, 0, 0, kind, h : h + 1, :]

    def fill_mask(self, runs: tuple) -> None:
        """Store 0 where row i sees row j, j <= i of one document, else -inf."""
        shape = self.mask.shape
        seen = jax.lax.broadcasted_iota(jnp.int32, shape, 0) >= lanes(shape)
        if runs:
            of_column, of_row = runs
            seen = seen & (of_column[0] == of_row[0, 0])
        self.mask[...] = jnp.where(seen, 0.0, -jnp.inf)

    def decays(self, h: int):
        """D = exp(c_i - c_j) [C, C], masked before exp: no exponent is above 0."""
        exponent = self.column(COLUMN_DECAY, h) - self.row(DECAY, h)
        return jnp.exp(exponent + self.mask[...])


def head(ref, h: int, dim: int):
    """Chunk of head h, [C, dim], of a block [1, C, heads * dim]."""
    return ref[0, :, h * dim : (h + 1) * dim]


def store_head(ref, h: int, value) -> None:
    dim = value.shape[1]
    ref[0, :, h * dim : (h + 1) * dim] = value.astype(ref.dtype)
