"""One token of the gated delta rule in Triton, at the speed at which the state can be moved.

    S <- exp(g) S     u = beta (v - S^T k)     S <- S + k u^T     o = scale S^T q

A block has some columns of one state, which do not mix with the others: it reads them once, works
in registers and writes them back.

    B batch   K key heads   R value heads   H key dim   E value dim, W columns of it
"""

import jax
import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.triton_gpu_launch import launch


def advance(scale, q, k, v, g, beta, state):
    """Return (o [B,R,E], state [B,R,H,E])."""
    B, R, H, E = state.shape
    W = 32
    return launch(
        gdn_step,
        (q, k, v, g, beta, state),
        (jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(state.shape, state.dtype)),
        grid=(E // W, R, B),
        warps=4,
        aliases={5: 1},
        SCALE=scale,
        R=R,
        K=q.shape[1],
        H=H,
        E=E,
        W=W,
    )


@triton.jit
def gdn_step(
    q,  # [B,K,H]
    k,  # [B,K,H]
    v,  # [B,R,E]
    g,  # [B,R]
    beta,  # [B,R]
    state,  # [B,R,H,E]
    o,  # [B,R,E]
    new_state,  # [B,R,H,E]
    SCALE: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    W: tl.constexpr,
):
    r, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, e = tl.arange(0, H), tl.program_id(0) * W + tl.arange(0, W)
    head, key_head = b * R + r, b * K + r // (R // K)
    at = head * (H * E) + h[:, None] * E + e[None, :]
    s = tl.load(state + at) * tl.exp(tl.load(g + head))
    k_H1 = tl.load(k + key_head * H + h).to(tl.float32)[:, None]
    q_H1 = tl.load(q + key_head * H + h).to(tl.float32)[:, None]
    v_W = tl.load(v + head * E + e).to(tl.float32)
    u = tl.load(beta + head) * (v_W - tl.sum(k_H1 * s, 0))
    s += k_H1 * u[None, :]
    tl.store(o + head * E + e, (SCALE * tl.sum(q_H1 * s, 0)).to(o.dtype.element_ty))
    tl.store(new_state + at, s)
