"""What the Mosaic GPU kernels of the gated delta rule share: 64-row tiles and their products.

Every matrix is a grid of [64, 64] tiles, the height of one wgmma and, in bf16, one row of the widest
swizzle. A block's warpgroups take one column of tiles each.
"""

import jax
import jax.numpy as jnp

TILE = 64


def tiles(dtype, *grid):
    """Shared memory for a grid of tiles [*grid,64,64] in the layout that wgmma and TMA read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*grid, TILE, TILE), dtype, transforms=transforms)


def products(*sums):
    """For every list of pairs return the fp32 sum of a @ b over it; all are in flight at once.

    Operands are refs in shared memory and accumulators start at zero: the interpreter knows neither
    operands in registers nor other initial values.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in sums]
    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])


def load(ref):
    """Read a tile into fp32 registers, laid out like a product."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def load_row(ref):
    """Read 64 numbers, one per row of a tile, and repeat them along it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return by_row(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)))


def load_column(ref):
    """Read 64 numbers, one per column of a tile, and repeat them along it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))
    return jax.lax.broadcast_in_dim(x, (TILE, TILE), [1])


def by_row(x):
    return jax.lax.broadcast_in_dim(x, (TILE, TILE), [0])


def indices():
    """The row and column numbers of a tile."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def along(axis):
        return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA)

    return along(0), along(1)
