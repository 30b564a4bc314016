"""The gradients that wait for no other chunk, in Triton, a block per chunk.

    R   = V - a K S                     V'  = X (beta R)
    dP  = tril(dO V'^T)                 dA  = -tril(dR~ V'^T, -1)
    dQ1 = scale a dO S^T                dQ  = dQ1 + (scale dP * D) K
    dK1 = z V' dS+^T                    dK2 = -a dV S^T             Y = beta (dA * D)
    dK  = dK1 + dK2 + (scale dP * D)^T Q + (Y + Y^T) K
    E   = dP * P + dA * A               dbeta = rowsum(dR~ * R) + rowsum(dA * B)
    dc  = rowsum(E) - colsum(E) + rowsum(Q * dQ1) + rowsum(K * dK2) - rowsum(K * dK1)
    dc_C += sum(K * dK1) + y <S, dS+>

The columns of S, dS+ and the values are walked through twice, W at a time, so that no more than
half of the sums are in registers at a time: first for what needs V', then for the rest. The sum
over the rows of K * dK2 is that of -a K S * dV, which saves keeping dK1 and dK2 apart.

    B batch   T tokens   Z chunks   C rows of a chunk   K key heads   R value heads
    H key dim   E value dim, W columns of it
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.triton_gpu import precision
from pallas_kernels.gated_delta_rule.triton_gpu_launch import launch
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
    store_rows,
    token_index,
)


def gradients(scale, q, k, v, gates, t_inv, states, do, dr, dstates):
    """Return dQ, dK [B,T,R,H], one per value head, and dc, dbeta [Z,B,R,C]."""
    Z, B, R, _, C = gates.shape
    (T, K, H), E = k.shape[1:], v.shape[3]
    keys = jax.ShapeDtypeStruct((B, T, R, H), q.dtype if R == K else jnp.float32)
    rows = jax.ShapeDtypeStruct((Z, B, R, C), jnp.float32)
    return launch(
        gdn_gradients,
        (q, k, v, gates, t_inv, states, do, dr, dstates, T),
        (keys, keys, rows, rows),
        grid=(Z, R, B),
        warps=8,
        SCALE=scale,
        R=R,
        K=K,
        H=H,
        E=E,
        C=C,
        W=32,
        PRECISION=precision(k.dtype),
    )


@triton.jit
def gdn_gradients(
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
    dq,  # [B,T,R,H]
    dk,  # [B,T,R,H]
    dc,  # [Z,B,R,C]
    dbeta,  # [Z,B,R,C]
    SCALE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n, r = tl.program_id(0), tl.program_id(1)
    chunk, token, rows = chunk_index(n, R), token_index(n, T, C), T - n * C
    key_rows, value_rows = (token * K + r // (R // K)) * H, (token * R + r) * E
    gates += chunk * (GATES * C)
    states += chunk * (H * E)
    dstates += chunk * (H * E)
    i = tl.arange(0, C)
    row_at = chunk * C + i
    k_CH = load_rows(k + key_rows, rows, K * H, C, H)
    beta, a = load_gate(gates, BETA, C), load_gate(gates, READ, C)

    dk_CH, dp, da, read, dbeta_C, kept = _of_new_values(
        k_CH,
        v + value_rows,
        tl.load(t_inv + chunk * (C * C) + i[:, None] * C + i[None, :]),
        states,
        do + value_rows,
        dr + value_rows,
        dstates,
        beta,
        a,
        rows,
        R * E,
        PRECISION,
        W,
        E,
    )
    dk_CH *= load_gate(gates, WRITE, C)[:, None]
    written = tl.sum(k_CH.to(tl.float32) * dk_CH, 1)
    dc_C = read - written
    last = tl.sum(written, 0) + tl.load(gates + KEEP * C) * kept

    dq_CH = tl.zeros((C, H), tl.float32)
    for first in range(0, E, W):
        s_WH = tl.load(states + tl.arange(0, H)[None, :] * E + first + tl.arange(0, W)[:, None])
        do_CW = load_rows(do + value_rows + first, rows, R * E, C, W)
        dr_CW = load_rows(dr + value_rows + first, rows, R * E, C, W)
        gone = (-(a * beta)[:, None] * dr_CW.to(tl.float32)).to(s_WH.dtype)
        dq_CH = tl.dot(do_CW, s_WH, acc=dq_CH, input_precision=PRECISION)
        dk_CH = tl.dot(gone, s_WH, acc=dk_CH, input_precision=PRECISION)
    dq_CH *= SCALE * a[:, None]
    q_CH = load_rows(q + key_rows, rows, K * H, C, H)
    dc_C += tl.sum(q_CH.to(tl.float32) * dq_CH, 1)

    d = decay(gates, C)
    scores = SCALE * tl.dot(q_CH, tl.trans(k_CH), input_precision=PRECISION) * d
    pairs = tl.dot(k_CH, tl.trans(k_CH), input_precision=PRECISION) * d
    dp = tl.where(i[:, None] >= i[None, :], dp, 0.0)
    da = tl.where(i[:, None] > i[None, :], -da, 0.0)
    dbeta_C += tl.sum(da * pairs, 1)
    e = dp * scores + da * beta[:, None] * pairs
    dc_C += tl.sum(e, 1) - tl.sum(e, 0) + tl.where(i == C - 1, last, 0.0)
    tl.store(dc + row_at, dc_C)
    tl.store(dbeta + row_at, dbeta_C)

    dqk = (SCALE * dp * d).to(k_CH.dtype)
    dkk = beta[:, None] * da * d
    dkk = (dkk + tl.trans(dkk)).to(k_CH.dtype)
    dq_CH = tl.dot(dqk, k_CH, acc=dq_CH, input_precision=PRECISION)
    dk_CH = tl.dot(tl.trans(dqk), q_CH, acc=dk_CH, input_precision=PRECISION)
    dk_CH = tl.dot(dkk, k_CH, acc=dk_CH, input_precision=PRECISION)
    out_rows = (token * R + r) * H
    store_rows(dq + out_rows, dq_CH, rows, R * H, C, H)
    store_rows(dk + out_rows, dk_CH, rows, R * H, C, H)


@triton.jit
def _of_new_values(
    k_CH,
    v,
    x,
    states,
    do,
    dr,
    dstates,
    beta,
    a,
    rows,
    stride: tl.constexpr,
    PRECISION: tl.constexpr,
    W: tl.constexpr,
    E: tl.constexpr,
):
    """V' dS+^T, dO V'^T, dR~ V'^T, rowsum(K * dK2), rowsum(dR~ * R) and <S, dS+>."""
    C: tl.constexpr = k_CH.shape[0]
    H: tl.constexpr = k_CH.shape[1]
    dk_CH = tl.zeros((C, H), tl.float32)
    do_v, dr_v = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    read, dbeta, kept = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), 0.0
    at = tl.arange(0, H)[:, None] * E + tl.arange(0, W)
    for first in range(0, E, W):
        s, ds = tl.load(states + at + first), tl.load(dstates + at + first)
        dr_CW = load_rows(dr + first, rows, stride, C, W)
        v_CW = load_rows(v + first, rows, stride, C, W).to(tl.float32)
        ks = a[:, None] * tl.dot(k_CH, s, input_precision=PRECISION)
        rest = v_CW - ks
        new = tl.dot(x, (beta[:, None] * rest).to(x.dtype), input_precision=PRECISION)
        new = new.to(x.dtype)
        do_v = tl.dot(
            load_rows(do + first, rows, stride, C, W),
            tl.trans(new),
            acc=do_v,
            input_precision=PRECISION,
        )
        dr_v = tl.dot(dr_CW, tl.trans(new), acc=dr_v, input_precision=PRECISION)
        dk_CH = tl.dot(new, tl.trans(ds), acc=dk_CH, input_precision=PRECISION)
        wide = dr_CW.to(tl.float32)
        dbeta += tl.sum(wide * rest, 1)
        read -= beta * tl.sum(wide * ks, 1)
        kept += tl.sum(s.to(tl.float32) * ds.to(tl.float32))
    return dk_CH, do_v, dr_v, read, dbeta, kept
