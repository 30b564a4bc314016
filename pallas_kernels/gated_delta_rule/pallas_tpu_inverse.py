"""(I - N)^-1 of strictly lower triangular chunks in a TPU kernel, several heads in step.

Blocks of 16 rows are inverted by substitution in fp32, 8 heads in the sublanes of one register and
the 8 blocks of a chunk in its lanes. Then neighbours are joined, X_21 = X_22 N_21 X_11, until one
block is left. Nothing here forms a power of N (README, Inverse).

Packed [p, C]: group i of p lanes holds block i of the diagonal. A product of two packed matrices,
block by block, is one matmul of p rows whose right operand is their block diagonal [C, C], so
that joining two blocks streams p rows through the matrix unit, not C, and moves no lane.

    C rows of a chunk   p rows of a block
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta_rule.pallas_tpu_tiles import lanes, split, split_dot

FIRST = 16  # rows of the blocks that are inverted by substitution
SUBLANES = 8


def unit_lower_inverses(n: list, scratch, exact: bool) -> list:
    """Invert I - tril(n, -1) of every head [C, C] fp32; n is 0 above the diagonal.

    Products have fp32 operands if `exact`, else sums of two bf16.
    """
    size = n[0].shape[-1]
    x = _substitute([_pack_diagonal(a) for a in n], scratch)
    width = FIRST
    while width < size:
        x = _join(n, x, width, exact)
        width *= 2
    return x


def inverse_scratch(size: int):
    """Rows of the blocks that are inverted by substitution."""
    return pltpu.VMEM((FIRST * SUBLANES, size), jnp.float32)


def _substitute(packed: list, scratch) -> list:
    """Invert I - tril(n, -1) of packed blocks of 16 rows.

    With X = I + M row r is M_r = n_r + sum_{j<r} n_rj M_j, where M_0 = 0 and n_rj is to be spread
    over the lanes of its block.
    """
    size = packed[0].shape[-1]
    for h, a in enumerate(packed):  # row r of head h goes to sublane h of register r
        scratch[pl.ds(h, FIRST, stride=SUBLANES), :] = a
    lane = lanes((SUBLANES, size))
    inside, start = lane & (FIRST - 1), lane & ~(FIRST - 1)
    rows = []
    for r in range(FIRST):
        n_r = scratch[r * SUBLANES : (r + 1) * SUBLANES, :]
        row = jnp.where(inside < r, n_r, 0.0)
        for j in range(1, r):
            spread = jnp.take_along_axis(n_r, start + j, axis=1, mode="promise_in_bounds")
            row = row + spread * rows[j]
        rows.append(row)
    for r, row in enumerate(rows):
        scratch[r * SUBLANES : (r + 1) * SUBLANES, :] = row
    lane = lanes((FIRST, size))
    unit = jnp.where((lane & (FIRST - 1)) == _rows(FIRST, size), 1.0, 0.0)
    return [unit + scratch[pl.ds(h, FIRST, stride=SUBLANES), :] for h in range(len(packed))]


def _join(n: list, x: list, width: int, exact: bool) -> list:
    """Packed inverses of blocks of `width` -> those of 2 width."""
    size = n[0].shape[-1]
    even = (_group(width, (width, size)) & 1) == 0
    halves = [split(a, exact) for a in x]
    # Even groups: N_21 X_11. What the odd ones of the left operand hold meets rows that are 0.
    below = [split(_pack_below(a, width), exact) for a in n]
    rights = [[_block_diagonal(part, width, 0) for part in parts] for parts in halves]
    y = [split_dot(a, b) for a, b in zip(below, rights, strict=True)]
    y = [split(a, exact) for a in y]
    # The rows of odd groups hold the even groups of y, so that X_22 Y lands in the even groups.
    rights = [[_block_diagonal(part, width, 1) for part in parts] for parts in y]
    corner = [split_dot(a, b) for a, b in zip(halves, rights, strict=True)]
    joined = []
    for a, c in zip(x, corner, strict=True):
        joined.append(jnp.concatenate([jnp.where(even, a, 0.0), jnp.where(even, c, a)]))
    return joined


def _pack_diagonal(a):
    """[C, C] -> its blocks of 16 rows, packed."""
    size = a.shape[-1]
    group = _group(FIRST, (FIRST, size))
    packed = a[:FIRST]
    for i in range(1, size // FIRST):
        packed = jnp.where(group == i, a[i * FIRST : (i + 1) * FIRST], packed)
    return packed


def _pack_below(a, width: int):
    """[C, C] -> blocks (2j + 1, 2j) in the even groups 2j; the odd ones hold anything finite."""
    size = a.shape[-1]
    group = _group(width, (width, size))
    packed = a[width : 2 * width]
    for i in range(2, size // width, 2):
        packed = jnp.where(group == i, a[(i + 1) * width : (i + 2) * width], packed)
    return packed


def _block_diagonal(packed, width: int, shift: int):
    """[p, C] -> [C, C] whose row group i + shift holds lane group i, for even i; the rest is 0."""
    size, dtype = packed.shape[-1], packed.dtype
    if size == 2 * width:  # what meets the odd group of lanes is dropped from the result
        zero = jnp.zeros_like(packed)
        return jnp.concatenate([zero, packed] if shift else [packed, zero])
    words = pltpu.bitcast(packed, jnp.int32)  # two rows of bf16 in one: selects are of 32 bits
    group, zero = _group(width, words.shape), jnp.zeros_like(words)
    pieces = [
        jnp.where(group == i - shift, words, zero) if i % 2 == shift else zero
        for i in range(size // width)
    ]
    return pltpu.bitcast(jnp.concatenate(pieces), dtype)


def _group(width: int, shape: tuple[int, int]):
    return lanes(shape) >> (width.bit_length() - 1)


def _rows(rows: int, size: int):
    return jax.lax.broadcasted_iota(jnp.int32, (rows, size), 0)
