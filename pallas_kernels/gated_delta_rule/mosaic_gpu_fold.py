"""Maps of segments applied one after another on Hopper, S <- S M + F, in one kernel.

Rows of S do not mix: a warpgroup has 64 of them in registers. M is fp32 and may not be rounded: a
state would carry the error to the end of the sequence. So both operands are sums of two bf16, in
three products, and the product of the rests, which is below fp32's own rounding of the sum, is left
out. A step waits for M, not for the products.

    B batch   R value heads   H dims   N maps added, N - 1 applied   W warpgroups, H / 64
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import TILE, add_products
from pallas_kernels.hopper import matrix, parameters, slot_of

SLOTS = 2


def fold(added, factors, count, skip, dtype, backward):
    """Return S [N,B,R,H,H] fp32 with N = `count`; fp32 operands may be longer than they need be.

    Forward S_0 = added_0 and S_n = S_{n-1} factors_{skip+n-1} + added_n. Backward, from the end,
    S_{N-1} = added_{N-1} and S_n = S_{n+1} factors_{skip+n}^T + added_n. `dtype` is that of the
    products' operands.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    _, B, R, H, _ = added.shape
    W = H // TILE

    def body(added, factors, result, high_s, low_s, met):
        b, r, w = (jax.lax.axis_index(x) for x in ("batch", "head", "rows"))
        own = pl.ds(w * TILE, TILE)

        def read(ref, n):
            place = ref.at[n, b, r, own]
            return plgpu.load(place, layout=plgpu.Layout.WGMMA, optimized=False)

        def step(i, state):
            n = count - 2 - i if backward else i + 1
            slot = slot_of(i, SLOTS)
            factor = read(factors, skip + (n if backward else i))
            for half, half_s in zip(_halves(factor, dtype), (high_s, low_s), strict=True):
                half_s[slot, own] = half
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)
            high_m, low_m = (s.at[slot].T if backward else s.at[slot] for s in (high_s, low_s))
            high, low = _halves(state, dtype)
            pairs = (low, high_m), (high, low_m), (high, high_m)
            state = add_products(read(added, n), *pairs)
            result[n, b, r, own] = state
            return state

        first = count - 1 if backward else 0
        state = read(added, first)
        result[first, b, r, own] = state
        jax.lax.fori_loop(0, count - 1, step, state)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((count, *added.shape[1:]), jnp.float32),
        scratch_types=[
            matrix(dtype, SLOTS, H, H),
            matrix(dtype, SLOTS, H, H),
            plgpu.Barrier(num_arrivals=W),
        ],
        grid=(R, B),
        grid_names=("head", "batch"),
        num_threads=W,
        thread_name="rows",
        compiler_params=parameters(barriers=True),
        kernel_name="gdn_segment_fold",
    )(added, factors)


def _halves(x, dtype):
    """x in the narrow dtype, and the rest of it."""
    high = x.astype(dtype)
    return high, (x - high.astype(x.dtype)).astype(dtype)
