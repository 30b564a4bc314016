"""The inverse of I + tril(A, -1) of every chunk, as plain XLA.

C rows of a chunk (d, f its columns)
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.precision import dot


def unit_lower_inverse(a: Array) -> Array:
    """Invert I + tril(a, -1) by the block ladder, without powers of a.

    Repeated keys give a matrix whose powers reach 1e28 while its inverse stays near 1: series and
    Newton iterations lose every digit there, the ladder none. X starts as the inverses of the 1x1
    diagonal blocks; each level joins the two b-blocks of every 2b-block through the block L of a
    below the diagonal, X_21 = -X_22 L X_11.
    """
    return jax.lax.platform_dependent(a, tpu=whole_ladder, default=block_ladder)


def whole_ladder(a: Array) -> Array:
    """The ladder on whole matrices, X - X L X with the blocks L of all pairs at once.

    A TPU pads the last two axes of an array to a tile of 8 x 128: small blocks would fill memory
    with padding, and take the compiler longer than the rest of the layer.
    """
    row, column = jnp.arange(a.shape[-1])[:, None], jnp.arange(a.shape[-1])
    x, width = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape), 1
    while width < a.shape[-1]:
        odd = (row // width) % 2 == 1
        joined = jnp.where(odd & (column // width == row // width - 1), a, 0)
        if width > 1:
            joined = dot("...cd,...df->...cf", x, joined, "highest")
            joined = dot("...cd,...df->...cf", joined, x, "highest")
        x, width = x - joined, 2 * width
    return x


def block_ladder(a: Array) -> Array:
    """The ladder on the blocks alone."""
    size, width = a.shape[-1], 1
    x = jnp.ones((*a.shape[:-2], size, 1, 1), a.dtype)
    while width < size:
        joined = _diagonal_blocks(a, 2 * width)[..., width:, :width]
        pairs = x.reshape(*x.shape[:-3], size // (2 * width), 2, width, width)
        upper, lower = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -_small_product(_small_product(lower, joined), upper)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], -1)
        x = jnp.concatenate([top, jnp.concatenate([corner, lower], -1)], -2)
        width *= 2
    return x[..., 0, :, :]


def _small_product(a: Array, b: Array) -> Array:
    """Multiply batches of small squares; below 16 rows a fused sum beats a batched matmul."""
    if a.shape[-1] < 16:
        return jnp.sum(a[..., :, :, None] * b[..., None, :, :], -2)
    return dot("...cd,...df->...cf", a, b, "highest")


def _diagonal_blocks(a: Array, width: int) -> Array:
    """[..., C, C] -> [..., C / width, width, width]"""
    starts = range(0, a.shape[-1], width)
    return jnp.stack([a[..., i : i + width, i : i + width] for i in starts], -3)
