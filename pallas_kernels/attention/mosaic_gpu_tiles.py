"""What attention's kernels on Hopper share: the sizes of tiles, their memory, what a row sees."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import slot_of

ROWS = 64  # of a warpgroup's products
SLOTS = 2  # what is fetched ahead: blocks of keys forward, tiles of queries backward
QUERIES = 128  # of a block, forward
KEYS = 128  # of a block
LOG2E = math.log2(math.e)
LOWEST = -1e30  # below every logit, and yet LOWEST - LOWEST is a number


def per_row(ref):
    """Read one number for each row of a product, from device memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def along(x, shape, axis: int):
    """Repeat numbers of the rows (axis 0) or columns (axis 1) of a product over all of it."""
    return jax.lax.broadcast_in_dim(x, shape, [axis])


def columns(shape, start):
    """The numbers of the columns of a product."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return start + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def seen(keys, bounds, shape):
    """Where `keys` lie in [first, end) of the queries, which are the rows of the product."""
    first, end = (along(x, shape, 0) for x in bounds)
    return (keys >= first) & (keys < end)


def last_freed(steps, *free):
    """Wait for what frees the slots of the last steps, for which nothing more is fetched."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @pl.loop(jnp.maximum(steps - SLOTS, 0), steps)
    def _(i):
        for barrier in free:
            plgpu.barrier_wait(barrier.at[slot_of(i, SLOTS)])
