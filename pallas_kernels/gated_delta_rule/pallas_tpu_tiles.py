"""What the TPU kernels of the gated delta rule do with tiles: products, slices, gates of pairs."""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tpu_blocks as blocks_

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


def head(ref, h: int, dim: int):
    """Chunk of head h, [C, dim], of a block [1, C, heads * dim]."""
    return ref[0, :, h * dim : (h + 1) * dim]


def column(ref, kind: int, h: int):
    """[C, 1] of head h of a block [1, 1, C, 3 N]."""
    at = kind * (ref.shape[3] // len(blocks_.COLUMNS)) + h
    return ref[0, 0, :, at : at + 1]


def row(ref, kind: int, h: int):
    """[1, C] of head h of a block [1, 1, 1, 4, N, C]."""
    return ref[0, 0, 0, kind, h : h + 1, :]


def store_pair_mask(mask, runs) -> None:
    """Fill the scratch [C, C] with 0 where row i sees row j, j <= i of one document, else -inf."""
    shape = mask.shape
    seen = jax.lax.broadcasted_iota(jnp.int32, shape, 0) >= lanes(shape)
    if runs:
        of_column, of_row = runs
        seen = seen & (of_column[0] == of_row[0, 0])
    mask[...] = jnp.where(seen, 0.0, -jnp.inf)


def decays(columns, rows, mask, h: int):
    """exp(c_i - c_j) of the pairs of head h [C, C], masked before exp: no exponent is above 0."""
    exponent = column(columns, blocks_.COLUMN_DECAY, h) - row(rows, blocks_.DECAY, h)
    return jnp.exp2(exponent + mask[...])
