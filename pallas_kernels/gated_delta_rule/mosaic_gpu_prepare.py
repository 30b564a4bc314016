"""The inverses of all chunks on Hopper, a block each: A = beta tril(K K^T * D, -1), X = (I + A)^-1.

The block ladder of xla.py, with every level as two 64-row products on tensor cores:

    Y = X A where the level's blocks are, else 0          X <- X - Y X          b = 2, 4 ... C/2

X is block diagonal, so what X A holds outside those blocks is not needed and A itself, unmasked, is
the operand of every level. Each product is three: an fp32 operand is split into a bf16 and the bf16
of the rest, and the product of the rests is dropped. Measured against float64 it costs nothing that
rounding X to bf16 does not cost more.

    B batch   Z chunks   C rows of a chunk   K key heads   R value heads   H key dim
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import BETA, CUMULATIVE, RUN


def prepare(k, gates):
    """Return X [Z,B,R,C,C] in k's dtype from k [B,Z*C,K,H] and gates [Z,B,R,6,C]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    K, H = k.shape[2:]
    dtype, wgmma = k.dtype, plgpu.Layout.WGMMA
    square = plgpu.ACC((C, C), jnp.float32)

    def tile(*shape):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    def split(x, high_s, low_s):
        """Store fp32 x as the sum of two bf16 operands."""
        high, low = halves(x)
        high_s[...] = high
        low_s[...] = low
        plgpu.commit_smem()

    def halves(x):
        high = x.astype(dtype)
        return high, (x - high.astype(jnp.float32)).astype(dtype)

    def product(x, high_s, low_s):
        high, low = halves(x)

        def multiply(acc):
            plgpu.wgmma(acc, low, high_s)
            plgpu.wgmma(acc, high, low_s)
            plgpu.wgmma(acc, high, high_s)
            return acc[...]

        return pl.run_scoped(multiply, square)

    def body(k, gates, t_inv, k_s, gates_s, a_s, x_s, full):
        b, r, z = (jax.lax.axis_index(name) for name in ("batch", "head", "chunk"))
        key_head = jax.lax.div(r, jnp.int32(R // K))
        plgpu.copy_gmem_to_smem(k.at[b, pl.ds(z * C, C), key_head], k_s, full)
        plgpu.copy_gmem_to_smem(gates.at[z, b, r], gates_s, full)
        plgpu.barrier_wait(full)

        def by_row(i):
            row = plgpu.load(gates_s.at[i], layout=wgmma.reduce(1))
            return jax.lax.broadcast_in_dim(row, (C, C), [0])

        def by_column(i):
            column = plgpu.load(gates_s.at[i], layout=wgmma.reduce(0))
            return jax.lax.broadcast_in_dim(column, (C, C), [1])

        def key_products(acc):
            plgpu.wgmma(acc, k_s, k_s.T)
            return acc[...]

        i, j = (plgpu.broadcasted_iota(jnp.int32, (C, C), n, layout=wgmma) for n in (0, 1))
        seen = (i > j) & (by_row(RUN) == by_column(RUN))
        exponent = jnp.where(seen, by_row(CUMULATIVE) - by_column(CUMULATIVE), -jnp.inf)
        a = by_row(BETA) * jnp.exp(exponent) * pl.run_scoped(key_products, square)
        split(a, *a_s)
        # Two rows meet in the 2b-block whose number is the highest bit in which they differ.
        apart = i ^ j
        x = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, -a, 0.0))

        width = 2
        while width < C:
            split(x, *x_s)
            y = jnp.where((apart >= width) & (apart < 2 * width), product(x, *a_s), 0.0)
            x = x - product(y, *x_s)
            width *= 2
        x_s[0][...] = x.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s[0], t_inv.at[z, b, r])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((Z, B, R, C, C), dtype),
        scratch_types=[
            tile(C, H),
            plgpu.SMEM((rows, C), jnp.float32),
            [tile(C, C), tile(C, C)],
            [tile(C, C), tile(C, C)],
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(R, Z, B),
        grid_names=("head", "chunk", "batch"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="gdn_prepare",
    )
    return kernel(k, gates)
