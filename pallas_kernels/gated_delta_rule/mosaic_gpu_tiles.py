"""What the kernels of the gated delta rule on Hopper share: operands, products, decays.

A warpgroup multiplies 64 rows at a time, so C = 64 rows of a chunk and 64 columns of a head are the
unit of work, TILE.
"""

import jax
import jax.numpy as jnp

TILE = 64
PROCESSORS = 132  # of an H100 or H200


def products(*sums):
    """For every list of pairs return the fp32 sum of a @ b over it; all are in flight at once."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in sums]
    return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])


def add_products(start, *pairs):
    """Return start + the sum of a @ b over the pairs, in the registers of start."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def run(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(run)(plgpu.ACC.init(start))


def zeros(columns):
    """A product's start."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.layout_cast(jnp.zeros((TILE, columns), jnp.float32), plgpu.Layout.WGMMA)


def load(ref):
    """Read a tile into fp32 registers, laid out like a product."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def load_row(ref):
    """Read one number per row of a tile and repeat it along the row."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))
    return jax.lax.broadcast_in_dim(x, (TILE, TILE), [0])


def load_column(ref):
    """Read one number per column of a tile and repeat it along the column."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))
    return jax.lax.broadcast_in_dim(x, (TILE, TILE), [1])


def indices():
    """The row and column numbers of a tile."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def along(axis):
        return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=plgpu.Layout.WGMMA)

    return along(0), along(1)


def decay(cumulative, run):
    """D: exp(c_i - c_j) for i >= j inside a document, else 0; masked before exp."""
    i, j = indices()
    seen = (i >= j) & (load_row(run) == load_column(run))
    return jnp.exp(jnp.where(seen, load_row(cumulative) - load_column(cumulative), -jnp.inf))
