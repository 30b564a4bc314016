"""The gradient of the state from chunk to chunk in Triton, last to first.

    dV' = P^T dO + z K dS+      dR~ = X^T dV'      dV = beta dR~
    dS  = y dS+ + scale (a Q)^T dO - (a K)^T dV

P^T dO, which waits for no other chunk, is computed for all of them before (`gdn_answer`). As in the
forward, a block of `gdn_sweep` walks with some columns of dS in registers; it leaves dV, dR~ and
the dS+ of every chunk for the other gradients.

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


def answer(scale, q, k, gates, do):
    """Return P^T dO [B,T,R,E] in do's dtype."""
    Z, B, R, _, C = gates.shape
    (T, K, H), E = k.shape[1:], do.shape[3]
    return launch(
        gdn_answer,
        (q, k, gates, do, T),
        jax.ShapeDtypeStruct(do.shape, do.dtype),
        grid=(Z, R, B),
        SCALE=scale,
        R=R,
        K=K,
        H=H,
        E=E,
        C=C,
        **tiling(k.dtype, H, E),
    )


@triton.jit
def gdn_answer(
    q,  # [B,T,K,H]
    k,  # [B,T,K,H]
    gates,  # [Z,B,R,6,C]
    do,  # [B,T,R,E]
    T,
    p_do,  # [B,T,R,E]
    SCALE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    HOW: tl.constexpr,
):
    n, r = tl.program_id(0), tl.program_id(1)
    token, rows = token_index(n, T, C), T - n * C
    gates += chunk_index(n, R) * (GATES * C)
    key_rows = (token * K + r // (R // K)) * H
    scores = products(q + key_rows, k + key_rows, rows, K * H, C, H, W, HOW)
    p_T = tl.trans((SCALE * scores * decay(gates, C)).to(do.dtype.element_ty))
    value_rows = (token * R + r) * E
    for first in range(0, E, W):
        do_CW = load_rows(do + value_rows + first, rows, R * E, C, W)
        out = tl.dot(p_T, do_CW, input_precision=HOW)
        store_rows(p_do + value_rows + first, out, rows, R * E, C, W)


def sweep(scale, q, k, gates, t_inv, do, p_do, dlast):
    """Return dV, dR~ [B,T,R,E], dS+ of all chunks [Z,B,R,H,E], dS of the first [B,R,H,E]."""
    Z, B, R, _, C = gates.shape
    (T, K, H), E = k.shape[1:], do.shape[3]
    tiles = tiling(k.dtype, H, E)
    stages = 2 if k.dtype == jnp.bfloat16 else 1  # fp32 tiles fill the memory of sm_86 once
    return launch(
        gdn_sweep,
        (q, k, gates, t_inv, do, p_do, dlast, T),
        (
            jax.ShapeDtypeStruct(do.shape, do.dtype),
            jax.ShapeDtypeStruct(do.shape, do.dtype),
            jax.ShapeDtypeStruct((Z, B, R, H, E), do.dtype),
            jax.ShapeDtypeStruct(dlast.shape, jnp.float32),
        ),
        grid=(E // tiles["W"], R, B),
        SCALE=scale,
        R=R,
        K=K,
        H=H,
        E=E,
        C=C,
        stages=stages,
        **tiles,
    )


@triton.jit
def gdn_sweep(
    q,  # [B,T,K,H]
    k,  # [B,T,K,H]
    gates,  # [Z,B,R,6,C]
    t_inv,  # [Z,B,R,C,C]
    do,  # [B,T,R,E]
    p_do,  # [B,T,R,E]
    dlast,  # [B,R,H,E]
    T,
    dv,  # [B,T,R,E]
    dr,  # [B,T,R,E]
    dstates,  # [Z,B,R,H,E]
    dinitial,  # [B,R,H,E]
    SCALE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    HOW: tl.constexpr,
):
    first, r = tl.program_id(0) * W, tl.program_id(1)
    at = tl.arange(0, H)[:, None] * E + first + tl.arange(0, W)
    head = (tl.program_id(2).to(tl.int64) * R + r) * (H * E)
    dstate = tl.load(dlast + head + at)
    i, Z = tl.arange(0, C), tl.cdiv(T, C)
    for m in range(Z):
        n = Z - 1 - m
        chunk, token, rows = chunk_index(n, R), token_index(n, T, C), T - n * C
        key_rows = (token * K + r // (R // K)) * H
        value_rows = (token * R + r) * E + first
        chunk_gates = gates + chunk * (GATES * C)
        k_CH = load_rows(k + key_rows, rows, K * H, C, H)
        q_CH = load_rows(q + key_rows, rows, K * H, C, H)
        do_CW = load_rows(do + value_rows, rows, R * E, C, W)
        p_do_CW = load_rows(p_do + value_rows, rows, R * E, C, W)
        x = tl.load(t_inv + chunk * (C * C) + i[:, None] * C + i[None, :])
        a, z = load_gate(chunk_gates, READ, C), load_gate(chunk_gates, WRITE, C)
        beta, keep = load_gate(chunk_gates, BETA, C), tl.load(chunk_gates + KEEP * C)
        ds = dstate.to(k.dtype.element_ty)
        tl.store(dstates + chunk * (H * E) + at, ds)
        dv_new = z[:, None] * tl.dot(k_CH, ds, input_precision=HOW)
        dv_new = (dv_new + p_do_CW.to(tl.float32)).to(x.dtype)
        dr_CW = tl.dot(tl.trans(x), dv_new, input_precision=HOW)
        dv_CW = beta[:, None] * dr_CW
        store_rows(dr + value_rows, dr_CW, rows, R * E, C, W)
        store_rows(dv + value_rows, dv_CW, rows, R * E, C, W)
        read = (SCALE * a[:, None] * do_CW.to(tl.float32)).to(x.dtype)
        gone = (-a[:, None] * dv_CW).to(x.dtype)
        dstate = tl.dot(tl.trans(q_CH), read, acc=keep * dstate, input_precision=HOW)
        dstate = tl.dot(tl.trans(k_CH), gone, acc=dstate, input_precision=HOW)
    tl.store(dinitial + head + at, dstate)
