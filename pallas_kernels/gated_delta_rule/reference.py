"""The gated delta rule token by token, the definition that every other implementation must match.

    S <- exp(g_t) S     u = beta_t (v_t - S^T k_t)     S <- S + k_t u^T     o_t = scale S^T q_t

The state is zeroed at the first token of every document but the first. Arithmetic is in the
accumulator's dtype at full precision; JAX differentiates the scan.

    B batch   T tokens   K key heads   R = K G value heads   H key dim   E value dim
"""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import accumulator, dot


def check(params) -> None:
    """Accept everything."""


def apply(params, q, k, v, g, beta, runs, initial_state):
    """Return (o [B,T,R,E], last state [B,R,H,E])."""
    if runs is None:
        restart_BT = jnp.zeros(q.shape[:2], bool)
    else:
        restart_BT = jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, 0)))

    def token(state, x):
        *x, restart_B = x
        state = jnp.where(restart_B[:, None, None, None], jnp.zeros_like(state), state)
        o, state = apply_step(params, *x, state)
        return state, o

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta, restart_BT))
    state, o = jax.lax.scan(token, initial_state, xs)
    return jnp.moveaxis(o, 0, 1), state


def apply_step(params, q, k, v, g, beta, state):
    """Advance the state by one token; return (o [B,R,E], state)."""
    acc, dtype, groups = accumulator(q.dtype), v.dtype, v.shape[-2] // q.shape[-2]
    q_BRH, k_BRH = (jnp.repeat(x.astype(acc), groups, axis=-2) for x in (q, k))
    state = state * jnp.exp(g)[..., None, None]
    u_BRE = beta[..., None] * (v.astype(acc) - dot("brh,brhe->bre", k_BRH, state, "highest"))
    state = state + k_BRH[..., None] * u_BRE[..., None, :]
    o = params.scale * dot("brh,brhe->bre", q_BRH, state, "highest")
    return o.astype(dtype), state
