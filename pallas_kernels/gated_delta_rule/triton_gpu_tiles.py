"""What the Triton kernels share: where a chunk lies, its tiles of rows, its gates and its decay.

A grid is (chunk or columns, value head, row of the batch). Tiles of tokens have C rows, those
beyond the end of a sequence read as 0 and are not written. Offsets from the start of an array are
64 bits wide, those within a chunk 32.

    B batch   T tokens   Z chunks   C rows of a chunk   K key heads   R value heads
    D_ij = exp(c_i - c_j) [r_i = r_j] for i >= j, else 0
"""

import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule import mosaic_gpu_gates

# The rows of a chunk's gates.
CUMULATIVE = tl.constexpr(mosaic_gpu_gates.CUMULATIVE)
READ = tl.constexpr(mosaic_gpu_gates.READ)
WRITE = tl.constexpr(mosaic_gpu_gates.WRITE)
BETA = tl.constexpr(mosaic_gpu_gates.BETA)
RUN = tl.constexpr(mosaic_gpu_gates.RUN)
KEEP = tl.constexpr(mosaic_gpu_gates.KEEP)
GATES = tl.constexpr(6)


@triton.jit
def chunk_index(n, R: tl.constexpr):
    """Position of chunk n of this program's head in [Z,B,R]."""
    row = n * tl.num_programs(2).to(tl.int64) + tl.program_id(2)
    return row * R + tl.program_id(1)


@triton.jit
def token_index(n, T, C: tl.constexpr):
    """Position of the first token of chunk n in [B,T]."""
    return tl.program_id(2).to(tl.int64) * T + n * C


@triton.jit
def load_rows(x, rows, stride: tl.constexpr, C: tl.constexpr, width: tl.constexpr):
    """[C,width] from x on, the first `rows` of it; rows are `stride` numbers apart."""
    i, j = tl.arange(0, C), tl.arange(0, width)
    return tl.load(x + i[:, None] * stride + j, mask=(i < rows)[:, None], other=0.0)


@triton.jit
def store_rows(x, value, rows, stride: tl.constexpr, C: tl.constexpr, width: tl.constexpr):
    """Write the first `rows` of [C,width] from x on."""
    i, j = tl.arange(0, C), tl.arange(0, width)
    value = value.to(x.dtype.element_ty)
    tl.store(x + i[:, None] * stride + j, value, mask=(i < rows)[:, None])


@triton.jit
def products(
    x,
    y,
    rows,
    stride: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HOW: tl.constexpr,
):
    """X Y^T [C,C] of rows of H numbers, by W at a time: all at once would not fit in registers."""
    total = tl.zeros((C, C), tl.float32)
    for first in range(0, H, W):
        x_CW = load_rows(x + first, rows, stride, C, W)
        y_CW = load_rows(y + first, rows, stride, C, W)
        total = tl.dot(x_CW, tl.trans(y_CW), acc=total, input_precision=HOW)
    return total


@triton.jit
def load_gate(gates, which: tl.constexpr, C: tl.constexpr):
    """One row [C] of the gates [6,C] of a chunk."""
    return tl.load(gates + which * C + tl.arange(0, C))


@triton.jit
def decay(gates, C: tl.constexpr):
    """D [C,C]; what is not in it is masked before exp, which would overflow."""
    c, run, i = load_gate(gates, CUMULATIVE, C), load_gate(gates, RUN, C), tl.arange(0, C)
    inside = (i[:, None] >= i[None, :]) & (run[:, None] == run[None, :])
    return tl.exp(tl.where(inside, c[:, None] - c[None, :], float("-inf")))
