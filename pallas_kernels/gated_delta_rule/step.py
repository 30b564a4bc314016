"""One token of the gated delta rule for decoding, bound by the traffic of the state.

    S <- exp(g) S + k (beta (v - exp(g) S^T k))^T          o = scale S^T q

With p = S_0^T k and r = S_0^T q the output is o = scale (exp(g) r + (q.k) u), so the old state is
read once for both products and the new one is only written.

    B batch   K key heads   R = K G value heads   H key dim   E value dim
"""

import jax.numpy as jnp

from pallas_kernels.precision import accumulator


def check(params) -> None:
    """Accept everything."""


def apply(params, q, k, v, g, beta, state):
    """Advance the state by one token; return (o [B,R,E], state)."""
    acc, (B, R, H, E) = accumulator(q.dtype), state.shape
    K = q.shape[-2]
    grouped = (B, K, R // K)
    q_BKH, k_BKH = q.astype(acc), k.astype(acc)
    s_BKGHE = state.reshape(*grouped, H, E)
    decay_BKG1 = jnp.exp(g).reshape(*grouped, 1)
    # Sums of products, not dots: a matrix-vector dot would run at the matmul unit's precision.
    sk_BKGE = jnp.sum(s_BKGHE * k_BKH[:, :, None, :, None], axis=-2)
    sq_BKGE = jnp.sum(s_BKGHE * q_BKH[:, :, None, :, None], axis=-2)
    qk_BK11 = jnp.sum(q_BKH * k_BKH, axis=-1)[..., None, None]
    v_BKGE = v.astype(acc).reshape(*grouped, E)
    u_BKGE = beta.reshape(*grouped, 1) * (v_BKGE - decay_BKG1 * sk_BKGE)
    o = params.scale * (decay_BKG1 * sq_BKGE + qk_BK11 * u_BKGE)
    new = decay_BKG1[..., None] * s_BKGHE + k_BKH[:, :, None, :, None] * u_BKGE[..., None, :]
    return o.reshape(B, R, E).astype(v.dtype), new.reshape(state.shape)
