"""The inverses of all chunks on Hopper, a block each: A = beta tril(K K^T * D, -1), X = (I + A)^-1.

The block ladder of xla_inverse.py on tensor cores, whose products have 64 rows whatever is in them:

    X_21 = -X_22 A_21 X_11 in every 2b-block:      Y = spread(X) A_21      X <- X - spread(Y) X

Matrices of which only 16-blocks on or beside the diagonal matter are packed, [C,16] instead of
[C,C]: row i holds its own block's columns. `spread` puts them back where they belong in a left
operand, which wgmma takes from registers; right operands are in shared memory. Each product is
three: an fp32 operand is split into a bf16 and the bf16 of the rest, and the product of the rests
is dropped. Against float64 that costs nothing that rounding X to bf16 does not cost more.

    B batch   Z chunks   C = 64 rows of a chunk   K key heads   R value heads   H key dim
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import BETA, CUMULATIVE, RUN
from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import (
    decay,
    indices,
    load_row,
    products,
)
from pallas_kernels.hopper import matrix, parameters

SMALL, HALF = 16, 32  # 16 is what one step of wgmma contracts: packing below it saves nothing


def prepare(k, gates):
    """Return X [Z,B,R,C,C] in k's dtype from k [B,Z*C,K,H] and gates [Z,B,R,6,C]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    K, H = k.shape[2:]

    def body(k, gates, t_inv, k_s, gates_s, diagonal_s, left_s, corner_s, x_s, x_half_s, full):
        b, r, z = (jax.lax.axis_index(name) for name in ("batch", "head", "chunk"))
        key_head = jax.lax.div(r, jnp.int32(R // K))
        for n in range(H // C):
            part = k.at[b, pl.ds(z * C, C), key_head, pl.ds(n * C, C)]
            plgpu.copy_gmem_to_smem(part, k_s.at[n], full)
        plgpu.copy_gmem_to_smem(gates.at[z, b, r], gates_s, full)
        plgpu.barrier_wait(full)
        a = _pairs(k_s, gates_s)
        x = _invert(a, diagonal_s, left_s, corner_s, x_s, x_half_s)
        out_s = k_s.at[0]  # the keys are not needed any more
        out_s[...] = x.astype(k_s.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, t_inv.at[z, b, r])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((Z, B, R, C, C), k.dtype),
        scratch_types=[
            matrix(k.dtype, H // C, C, C),
            plgpu.SMEM((rows, C), jnp.float32),
            *([matrix(k.dtype, C, n)] * 2 for n in (SMALL, SMALL, HALF, SMALL, HALF)),
            plgpu.Barrier(num_arrivals=1 + H // C),
        ],
        grid=(R, Z, B),
        grid_names=("head", "chunk", "batch"),
        compiler_params=parameters(),
        kernel_name="gdn_prepare",
    )
    return kernel(k, gates)


def _pairs(k_s, gates_s):
    """A [C,C], strictly lower, from the keys in parts of C columns."""
    parts = [k_s.at[n] for n in range(k_s.shape[0])]
    (scores,) = products([(part, part.T) for part in parts])
    i, j = indices()
    scores = jnp.where(i > j, scores * decay(gates_s.at[CUMULATIVE], gates_s.at[RUN]), 0.0)
    return load_row(gates_s.at[BETA]) * scores


def _invert(a, diagonal_s, left_s, corner_s, x_s, x_half_s):
    """X [C,C] from A in registers, through pairs of buffers for the two halves of an operand."""
    C = a.shape[0]
    row, column = (part[:, :SMALL] for part in indices())
    block = row >> 4
    odd = (block & 1) == 1
    blocks = [a[:, n : n + SMALL] for n in range(0, C, SMALL)]
    zero = jnp.zeros_like(blocks[0])

    def gather(of_block):
        packed = zero
        for n, x in of_block.items():
            packed = jnp.where(block == n, x, packed)
        return packed

    def spread(packed, shift=0):
        """Row i's columns at block i // 16 - shift."""
        parts = [jnp.where(block == n + shift, packed, jnp.zeros_like(packed)) for n in range(4)]
        return jnp.concatenate(parts, 1)

    diagonal = gather(dict(enumerate(blocks)))
    _store(diagonal, diagonal_s)
    _store(gather({1: blocks[0], 3: blocks[2]}), left_s)
    _store(a[:, :HALF], corner_s)
    # Two rows meet in the 2b-block whose number is the highest bit in which they differ.
    apart = (row & (SMALL - 1)) ^ column
    x = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, -diagonal, 0.0))
    for width in (2, 4, 8):
        _store(x, x_s)
        y = _product(map(spread, _halves(x)), diagonal_s)
        y = jnp.where((apart >= width) & (apart < 2 * width), y, 0.0)
        x = x - _product(map(spread, _halves(y)), x_s)
    _store(x, x_s)
    y = _product(map(spread, _halves(x)), left_s)
    y = _product((spread(half, 1) for half in _halves(y)), x_s)
    x = jnp.concatenate([jnp.where(odd, -y, x), jnp.where(odd, x, 0.0)], 1)
    _store(x, x_half_s)
    row = indices()[0][:, :HALF]
    lower = jnp.where(row >= HALF, x, 0.0)
    y = _product(_halves(lower), [s.at[HALF:] for s in corner_s])
    y = _product(_halves(y), [s.at[:HALF] for s in x_half_s])
    return jnp.concatenate([jnp.where(row >= HALF, -y, x), lower], 1)


def _halves(x):
    """bf16 and bf16 of the rest."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _store(x, pair_s):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.commit_smem()  # all warps have read what was here
    for half, half_s in zip(_halves(x), pair_s, strict=True):
        half_s[...] = half
    plgpu.commit_smem()


def _product(left, right_s):
    """fp32 product of two operands in halves, the left in registers, the right in shared memory."""
    high, low = left
    high_s, low_s = right_s
    (result,) = products([(low, high_s), (high, low_s), (high, high_s)])
    return result
