"""The state from chunk to chunk in Triton, and then the outputs of all chunks at once.

    R  = V - a K S      V' = X (beta R)      S+ = y S + (z K)^T V'      O = scale a Q S + P V'

Columns of the state do not mix: a block of `gdn_recurrence` walks with some of them through all
chunks, in registers and fp32. It leaves V' and the state before every chunk for `gdn_read`.

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


def recurrence(k, v, gates, t_inv, initial_state):
    """Return V' [B,T,R,E], the states before all chunks [Z,B,R,H,E] and the last one [B,R,H,E]."""
    Z, B, R, _, C = gates.shape
    (T, K, H), E = k.shape[1:], v.shape[3]
    tiles = tiling(k.dtype, H, E)
    stages = 2 if k.dtype == jnp.bfloat16 else 1  # fp32 tiles fill the memory of sm_86 once
    return launch(
        gdn_recurrence,
        (k, v, gates, t_inv, initial_state, T),
        (
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((Z, B, R, H, E), v.dtype),
            jax.ShapeDtypeStruct(initial_state.shape, jnp.float32),
        ),
        grid=(E // tiles["W"], R, B),
        R=R,
        K=K,
        H=H,
        E=E,
        C=C,
        stages=stages,
        **tiles,
    )


@triton.jit
def gdn_recurrence(
    k,  # [B,T,K,H]
    v,  # [B,T,R,E]
    gates,  # [Z,B,R,6,C]
    t_inv,  # [Z,B,R,C,C]
    initial,  # [B,R,H,E]
    T,
    v_new,  # [B,T,R,E]
    states,  # [Z,B,R,H,E]
    last,  # [B,R,H,E]
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
    state = tl.load(initial + head + at)
    i = tl.arange(0, C)
    for n in range(tl.cdiv(T, C)):
        chunk, token, rows = chunk_index(n, R), token_index(n, T, C), T - n * C
        chunk_gates = gates + chunk * (GATES * C)
        k_CH = load_rows(k + (token * K + r // (R // K)) * H, rows, K * H, C, H)
        v_CW = load_rows(v + (token * R + r) * E + first, rows, R * E, C, W)
        x = tl.load(t_inv + chunk * (C * C) + i[:, None] * C + i[None, :])
        a, z = load_gate(chunk_gates, READ, C), load_gate(chunk_gates, WRITE, C)
        beta, keep = load_gate(chunk_gates, BETA, C), tl.load(chunk_gates + KEEP * C)
        s = state.to(k.dtype.element_ty)
        tl.store(states + chunk * (H * E) + at, s)
        read = a[:, None] * tl.dot(k_CH, s, input_precision=HOW)
        rest = beta[:, None] * (v_CW.to(tl.float32) - read)
        new = tl.dot(x, rest.to(x.dtype), input_precision=HOW)
        store_rows(v_new + (token * R + r) * E + first, new, rows, R * E, C, W)
        new = (z[:, None] * new).to(x.dtype)
        state = tl.dot(tl.trans(k_CH), new, acc=keep * state, input_precision=HOW)
    tl.store(last + head + at, state)


def read(scale, q, k, gates, states, v_new):
    """Return the outputs [B,T,R,E]."""
    Z, B, R, _, C = gates.shape
    (T, K, H), E = k.shape[1:], v_new.shape[3]
    return launch(
        gdn_read,
        (q, k, gates, states, v_new, T),
        jax.ShapeDtypeStruct(v_new.shape, v_new.dtype),
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
def gdn_read(
    q,  # [B,T,K,H]
    k,  # [B,T,K,H]
    gates,  # [Z,B,R,6,C]
    states,  # [Z,B,R,H,E]
    v_new,  # [B,T,R,E]
    T,
    o,  # [B,T,R,E]
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
    chunk, token, rows = chunk_index(n, R), token_index(n, T, C), T - n * C
    gates += chunk * (GATES * C)
    key_rows = (token * K + r // (R // K)) * H
    q_CH = load_rows(q + key_rows, rows, K * H, C, H)
    scores = products(q + key_rows, k + key_rows, rows, K * H, C, H, W, HOW)
    p = (SCALE * scores * decay(gates, C)).to(q_CH.dtype)
    a = SCALE * load_gate(gates, READ, C)
    states += chunk * (H * E)
    value_rows = (token * R + r) * E
    for first in range(0, E, W):
        s = tl.load(states + tl.arange(0, H)[:, None] * E + first + tl.arange(0, W))
        new = load_rows(v_new + value_rows + first, rows, R * E, C, W)
        out = a[:, None] * tl.dot(q_CH, s, input_precision=HOW)
        out = tl.dot(p, new, acc=out, input_precision=HOW)
        store_rows(o + value_rows + first, out, rows, R * E, C, W)
