"""The gradients that wait for no other chunk, in Triton: two kernels, a block per chunk.

`gdn_pairs` finds V' again and what pairs of rows tell,

    R   = V - a K S                     V'  = X (beta R)
    dP  = tril(dO V'^T)                 dA  = -tril(dR~ V'^T, -1)       Y = beta (dA * D)
    E   = dP * P + dA * A               dbeta = rowsum(dR~ * R) + rowsum(dA * B)

`gdn_keys` the gradients of queries and keys from scale dP * D, Y + Y^T and the states:

    dQ1 = scale a dO S^T                dQ  = dQ1 + (scale dP * D) K
    dK1 = z V' dS+^T                    dK2 = -a dV S^T
    dK  = dK1 + dK2 + (scale dP * D)^T Q + (Y + Y^T) K
    dc  = rowsum(E) - colsum(E) + rowsum(Q * dQ1) + rowsum(K * dK2) - rowsum(K * dK1)
    dc_C += sum(K * dK1) + y <S, dS+>

In one kernel the sums would not fit into registers. rowsum(K * dK2) is that of -a K S * dV, which
the first kernel has at hand, so that the second need not keep dK1 and dK2 apart.

    B batch   T tokens   Z chunks   C rows of a chunk   K key heads   R value heads
    H key dim   E value dim, W columns of it
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.triton_gpu_launch import launch, tiling
from pallas_kernels.gated_delta_rule.triton_gpu_tiles import (
    BETA,
    GATES,
    KEEP,
    READ,
    WRITE,
    chunk_index,
    decay,
    load_gate,
    load_rows,
    products,
    store_rows,
    token_index,
)

# Rows of a state that are multiplied at a time: more, in fp32, would not fit into shared memory.
PART = tl.constexpr(64)


def gradients(scale, q, k, v, gates, t_inv, states, do, dr, dstates):
    """Return dQ, dK [B,T,R,H], one per value head, and dc, dbeta [Z,B,R,C]."""
    Z, B, R, _, C = gates.shape
    (T, K, H), E = k.shape[1:], v.shape[3]
    squares = jax.ShapeDtypeStruct((Z, B, R, C, C), q.dtype)
    rows = jax.ShapeDtypeStruct((Z, B, R, C), jnp.float32)
    shared = dict(R=R, K=K, H=H, E=E, C=C, SCALE=scale) | tiling(k.dtype, H, E)
    v_new, dqk, dkk, dc, dbeta = launch(
        gdn_pairs,
        (q, k, v, gates, t_inv, states, do, dr, dstates, T),
        (jax.ShapeDtypeStruct(v.shape, v.dtype), squares, squares, rows, rows),
        grid=(Z, R, B),
        **shared,
    )
    keys = jax.ShapeDtypeStruct((B, T, R, H), q.dtype if R == K else jnp.float32)
    dq, dk, dc = launch(
        gdn_keys,
        (q, k, gates, states, do, dr, dstates, v_new, dqk, dkk, dc, T),
        (keys, keys, rows),
        grid=(Z, R, B),
        **shared,
    )
    return dq, dk, dc, dbeta


@triton.jit
def gdn_pairs(
    q,  # [B,T,K,H]
    k,  # [B,T,K,H]
    v,  # [B,T,R,E]
    gates,  # [Z,B,R,6,C]
    t_inv,  # [Z,B,R,C,C]
    states,  # [Z,B,R,H,E]
    do,  # [B,T,R,E]
    dr,  # [B,T,R,E]
    dstates,  # [Z,B,R,H,E]
    T,
    v_new,  # [B,T,R,E]
    dqk,  # [Z,B,R,C,C]
    dkk,  # [Z,B,R,C,C]
    dc,  # [Z,B,R,C]
    dbeta,  # [Z,B,R,C]
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    SCALE: tl.constexpr,
    HOW: tl.constexpr,
):
    n, r = tl.program_id(0), tl.program_id(1)
    chunk, token, rows = chunk_index(n, R), token_index(n, T, C), T - n * C
    key_rows, value_rows = (token * K + r // (R // K)) * H, (token * R + r) * E
    gates += chunk * (GATES * C)
    i = tl.arange(0, C)
    square = i[:, None] * C + i[None, :]
    beta, a = load_gate(gates, BETA, C), load_gate(gates, READ, C)
    x = tl.load(t_inv + chunk * (C * C) + square)

    dp, da = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    dc_C, dbeta_C, kept = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), 0.0
    h, w = tl.arange(0, PART), tl.arange(0, W)
    state_at = chunk * (H * E) + h[:, None] * E + w[None, :]
    for first in range(0, E, W):
        read = tl.zeros((C, W), tl.float32)
        for part in range(0, H, PART):
            s = tl.load(states + state_at + part * E + first)
            ds = tl.load(dstates + state_at + part * E + first)
            k_CP = load_rows(k + key_rows + part, rows, K * H, C, PART)
            read = tl.dot(k_CP, s, acc=read, input_precision=HOW)
            kept += tl.sum(s.to(tl.float32) * ds.to(tl.float32))
        read *= a[:, None]
        v_CW = load_rows(v + value_rows + first, rows, R * E, C, W).to(tl.float32)
        rest = v_CW - read
        new = tl.dot(x, (beta[:, None] * rest).to(x.dtype), input_precision=HOW)
        new = new.to(x.dtype)
        store_rows(v_new + value_rows + first, new, rows, R * E, C, W)
        do_CW = load_rows(do + value_rows + first, rows, R * E, C, W)
        dr_CW = load_rows(dr + value_rows + first, rows, R * E, C, W)
        dp = tl.dot(do_CW, tl.trans(new), acc=dp, input_precision=HOW)
        da = tl.dot(dr_CW, tl.trans(new), acc=da, input_precision=HOW)
        wide = dr_CW.to(tl.float32)
        dbeta_C += tl.sum(wide * rest, 1)
        dc_C -= beta * tl.sum(wide * read, 1)

    d = decay(gates, C)
    dp = tl.where(i[:, None] >= i[None, :], SCALE * dp, 0.0) * d
    tl.store(dqk + chunk * (C * C) + square, dp.to(dqk.dtype.element_ty))
    e = dp * products(q + key_rows, k + key_rows, rows, K * H, C, H, W, HOW)
    da = tl.where(i[:, None] > i[None, :], -da, 0.0) * d
    of_pairs = da * products(k + key_rows, k + key_rows, rows, K * H, C, H, W, HOW)
    dbeta_C += tl.sum(of_pairs, 1)
    e += beta[:, None] * of_pairs
    da *= beta[:, None]
    tl.store(dkk + chunk * (C * C) + square, (da + tl.trans(da)).to(dkk.dtype.element_ty))
    dc_C += tl.sum(e, 1) - tl.sum(e, 0)
    dc_C += tl.where(i == C - 1, tl.load(gates + KEEP * C) * kept, 0.0)
    tl.store(dc + chunk * C + i, dc_C)
    tl.store(dbeta + chunk * C + i, dbeta_C)


@triton.jit
def gdn_keys(
    q,  # [B,T,K,H]
    k,  # [B,T,K,H]
    gates,  # [Z,B,R,6,C]
    states,  # [Z,B,R,H,E]
    do,  # [B,T,R,E]
    dr,  # [B,T,R,E]
    dstates,  # [Z,B,R,H,E]
    v_new,  # [B,T,R,E]
    dqk,  # [Z,B,R,C,C]
    dkk,  # [Z,B,R,C,C]
    dc_of_pairs,  # [Z,B,R,C]
    T,
    dq,  # [B,T,R,H]
    dk,  # [B,T,R,H]
    dc,  # [Z,B,R,C]
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    SCALE: tl.constexpr,
    HOW: tl.constexpr,
):
    n, r = tl.program_id(0), tl.program_id(1)
    chunk, token, rows = chunk_index(n, R), token_index(n, T, C), T - n * C
    key_rows, value_rows = (token * K + r // (R // K)) * H, (token * R + r) * E
    gates += chunk * (GATES * C)
    i = tl.arange(0, C)
    transposed = chunk * (H * E) + tl.arange(0, H)[None, :] * E + tl.arange(0, W)[:, None]

    dq_CH, dk_CH = tl.zeros((C, H), tl.float32), tl.zeros((C, H), tl.float32)
    for first in range(0, E, W):
        do_CW = load_rows(do + value_rows + first, rows, R * E, C, W)
        new = load_rows(v_new + value_rows + first, rows, R * E, C, W)
        s, ds = tl.load(states + transposed + first), tl.load(dstates + transposed + first)
        dq_CH = tl.dot(do_CW, s, acc=dq_CH, input_precision=HOW)
        dk_CH = tl.dot(new, ds, acc=dk_CH, input_precision=HOW)

    q_CH = load_rows(q + key_rows, rows, K * H, C, H)
    k_CH = load_rows(k + key_rows, rows, K * H, C, H)
    a = load_gate(gates, READ, C)
    dq_CH *= SCALE * a[:, None]
    dk_CH *= load_gate(gates, WRITE, C)[:, None]
    written = tl.sum(k_CH.to(tl.float32) * dk_CH, 1)
    dc_C = tl.load(dc_of_pairs + chunk * C + i) + tl.sum(q_CH.to(tl.float32) * dq_CH, 1) - written
    dc_C += tl.where(i == C - 1, tl.sum(written, 0), 0.0)
    tl.store(dc + chunk * C + i, dc_C)

    gone = -a * load_gate(gates, BETA, C)
    for first in range(0, E, W):
        dr_CW = load_rows(dr + value_rows + first, rows, R * E, C, W)
        s = tl.load(states + transposed + first)
        dv_CW = (gone[:, None] * dr_CW.to(tl.float32)).to(s.dtype)
        dk_CH = tl.dot(dv_CW, s, acc=dk_CH, input_precision=HOW)
    j = tl.arange(0, W)
    for first in range(0, C, W):
        k_WH = load_rows(k + key_rows + first * (K * H), rows - first, K * H, W, H)
        q_WH = load_rows(q + key_rows + first * (K * H), rows - first, K * H, W, H)
        across = chunk * (C * C) + i[:, None] * C + first + j[None, :]
        along = chunk * (C * C) + (first + j)[None, :] * C + i[:, None]
        dq_CH = tl.dot(tl.load(dqk + across), k_WH, acc=dq_CH, input_precision=HOW)
        dk_CH = tl.dot(tl.load(dqk + along), q_WH, acc=dk_CH, input_precision=HOW)
        dk_CH = tl.dot(tl.load(dkk + across), k_WH, acc=dk_CH, input_precision=HOW)
    out_rows = (token * R + r) * H
    store_rows(dq + out_rows, dq_CH, rows, R * H, C, H)
    store_rows(dk + out_rows, dk_CH, rows, R * H, C, H)
