"""The backward of the gated delta rule on Ampere and Ada: gate rows, the kernels, the last sums.

The sweep walks over the chunks of a head with the state's gradient, the rest is one block per chunk
(letters and formulas: README). Here, per chunk, with c the cumulative g and dc its gradient:

    dg_i = sum_{j >= i} dc_j

    B batch   T tokens   Z chunks   C rows of a chunk   K key heads   R value heads   H key dim
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import gate_rows


def backward(params, q, k, v, g, beta, runs, initial_state, t_inv, states, do, dstate):
    """Return the gradients of q, k, v, g, beta and the initial state.

    Shapes and residuals are those of `xla.backward`.
    """
    from pallas_kernels.gated_delta_rule.triton_gpu_gradients import gradients
    from pallas_kernels.gated_delta_rule.triton_gpu_sweep import answer, sweep

    del initial_state  # it is states[0]
    T, K = q.shape[1:3]
    gates = gate_rows(params.config.chunk, g, beta, runs)
    p_do = answer(params.scale, q, k, gates, do)
    dv, dr, dstates, dinitial = sweep(params.scale, q, k, gates, t_inv, do, p_do, dstate)
    dq, dk, dc, dbeta = gradients(params.scale, q, k, v, gates, t_inv, states, do, dr, dstates)
    dg = jax.lax.cumsum(dc, axis=3, reverse=True)
    dq, dk = (_summed(x, K).astype(q.dtype) for x in (dq, dk))
    return dq, dk, dv, _tokens(dg, T), _tokens(dbeta, T), dinitial


def _summed(x, K):
    """[B,T,R,H] -> [B,T,K,H], over the value heads of a key head."""
    B, T, R, H = x.shape
    return x if R == K else jnp.sum(x.reshape(B, T, K, R // K, H), 3)


def _tokens(x, T):
    """[Z,B,R,C] -> [B,T,R]"""
    Z, B, R, C = x.shape
    return x.transpose(1, 0, 3, 2).reshape(B, Z * C, R)[:, :T]
