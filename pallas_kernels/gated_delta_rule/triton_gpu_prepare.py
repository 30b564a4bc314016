"""The inverses of all chunks in Triton, a block each: A = beta tril(K K^T * D, -1), X = (I + A)^-1.

The four 16-blocks on the diagonal are inverted side by side by substitution, a row at a time,

    X_i = e_i - sum_{j<i} A_ij X_j

and joined by two levels of the ladder, X_21 = -X_22 A_21 X_11. No power of A is formed. Products
are those of TF32 parts, three each, as good as fp32.

    B batch   T tokens   Z chunks   C = 64 rows of a chunk   K key heads   R value heads
    H key dim   N rows of a block
"""

import jax
import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.triton_gpu_launch import launch, tiling
from pallas_kernels.gated_delta_rule.triton_gpu_tiles import (
    BETA,
    GATES,
    chunk_index,
    decay,
    load_gate,
    products,
    token_index,
)


def prepare(k, gates):
    """Return X [Z,B,R,C,C] in k's dtype from k [B,T,K,H] and gates [Z,B,R,6,C]."""
    Z, B, R, _, C = gates.shape
    T, K, H = k.shape[1:]
    return launch(
        gdn_prepare,
        (k, gates, T),
        jax.ShapeDtypeStruct((Z, B, R, C, C), k.dtype),
        grid=(Z, R, B),
        R=R,
        K=K,
        H=H,
        C=C,
        **tiling(k.dtype, H, H) | {"warps": 4},
    )


@triton.jit
def gdn_prepare(
    k,  # [B,T,K,H]
    gates,  # [Z,B,R,6,C]
    T,
    t_inv,  # [Z,B,R,C,C]
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    HOW: tl.constexpr,
):
    n = tl.program_id(0)
    chunk, key_head = chunk_index(n, R), tl.program_id(1) // (R // K)
    gates += chunk * (GATES * C)
    k += (token_index(n, T, C) * K + key_head) * H
    scores = products(k, k, T - n * C, K * H, C, H, W, HOW)
    i = tl.arange(0, C)
    below = i[:, None] > i[None, :]
    a = tl.where(below, load_gate(gates, BETA, C)[:, None] * scores * decay(gates, C), 0.0)
    x = inverse(a)
    at = i[:, None] * C + i[None, :]
    tl.store(t_inv + chunk * (C * C) + at, x.to(t_inv.dtype.element_ty))


@triton.jit
def inverse(a):
    """Invert I + a, a [64,64] strictly lower."""
    x0, x1, x2, x3 = _inverse_blocks(a)
    upper, _, corner, lower = _quarters(a, 32)
    _, _, upper_corner, _ = _quarters(upper, 16)
    _, _, lower_corner, _ = _quarters(lower, 16)
    x_upper = _joined(x0, _below(x1, upper_corner, x0), x1, 16)
    x_lower = _joined(x2, _below(x3, lower_corner, x2), x3, 16)
    return _joined(x_upper, _below(x_lower, corner, x_upper), x_lower, 32)


@triton.jit
def _inverse_blocks(a):
    """The inverses of the four 16-blocks on the diagonal, by substitution."""
    block = tl.arange(0, 4)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    a = tl.sum(tl.where(diagonal, tl.reshape(a, (4, 16, 4, 16)), 0.0), 2)
    i = tl.arange(0, 16)
    row, column = i[None, :, None], i[None, None, :]
    x = tl.where(row == column, 1.0, tl.zeros_like(a))
    for n in range(1, 16):
        factors = tl.sum(tl.where(row == n, a, 0.0), 1)
        found = tl.sum(factors[:, :, None] * x, 1)
        x -= tl.where(row == n, found[:, None, :], 0.0)
    pairs = tl.reshape(tl.permute(x, (1, 2, 0)), (16, 16, 2, 2))
    even, odd = tl.split(pairs)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _below(lower, corner, upper):
    """-X_22 A_21 X_11"""
    product = tl.dot(lower, corner, input_precision="tf32x3")
    return -tl.dot(product, upper, input_precision="tf32x3")


@triton.jit
def _quarters(x, N: tl.constexpr):
    """x_11, x_12, x_21, x_22 [N,N] of x [2N,2N]."""
    left, right = tl.split(tl.permute(tl.reshape(x, (2, N, 2, N)), (1, 3, 0, 2)))
    x_11, x_21 = tl.split(left)
    x_12, x_22 = tl.split(right)
    return x_11, x_12, x_21, x_22


@triton.jit
def _joined(x_11, x_21, x_22, N: tl.constexpr):
    """[2N,2N] from its quarters, the upper right one being 0."""
    left, right = tl.join(x_11, x_21), tl.join(tl.zeros_like(x_22), x_22)
    return tl.reshape(tl.permute(tl.join(left, right), (2, 0, 3, 1)), (2 * N, 2 * N))
