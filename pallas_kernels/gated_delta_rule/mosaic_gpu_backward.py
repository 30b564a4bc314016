"""The backward of the gated delta rule on Hopper: gate rows, the two kernels, and the last sums.

The sweep walks over the chunks of a head with the state's gradient, the rest is one block per chunk
(letters and formulas: README). Here, per chunk, with c the cumulative g and dc its gradient:

    dg_i = sum_{j >= i} dc_j + sum(K * dK1) + y <S, dS+>

    B batch   T tokens   Z chunks   C rows of a chunk   K key heads   R value heads   H key dim
    E value dim
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import KEEP, gate_rows, whole_chunks
from pallas_kernels.gated_delta_rule.mosaic_gpu_gradients import gradients
from pallas_kernels.gated_delta_rule.mosaic_gpu_segments import choose_segments, segment_ends
from pallas_kernels.gated_delta_rule.mosaic_gpu_sweep import sweep


def backward(params, q, k, v, g, beta, runs, initial_state, t_inv, states, do, dstate):
    """Return the gradients of q, k, v, g, beta and the initial state.

    Shapes and residuals are those of `xla.backward`. H = E, a multiple of 64.
    """
    del initial_state  # it is states[0]
    B, T, K, H = q.shape
    R, C = v.shape[2], params.config.chunk
    gates = gate_rows(C, g, beta, runs)
    q_, k_, v_, do_ = (whole_chunks(x, C) for x in (q, k, v, do))
    swept = params.scale, q_, k_, do_, gates, t_inv
    segments = choose_segments("backward", params.config, B * R, gates.shape[0], H)
    ends = segment_ends(*swept, dstate.mT, segments)
    dstate_t, dstates, dr = sweep(*swept, ends, -(-gates.shape[0] // segments))
    dq, dk, dv, sums = gradients(params.scale, q_, k_, v_, do_, gates, t_inv, states, dstates, dr)
    of_rows, of_columns, written, dbeta, kept = jnp.moveaxis(jnp.sum(sums, 3), 3, 0)
    last = jnp.sum(written + gates[..., KEEP, :] * kept, -1, keepdims=True)
    dc = of_rows - of_columns - written
    dg = last + jax.lax.cumsum(dc, axis=3, reverse=True)

    def summed(x):  # over the value heads of a key head
        if R > K:
            x = jnp.sum(x.reshape(B, -1, K, R // K, H).astype(jnp.float32), 3).astype(x.dtype)
        return x[:, :T]

    return summed(dq), summed(dk), dv[:, :T], _tokens(dg, T), _tokens(dbeta, T), dstate_t[0].mT


def _tokens(x, T):
    """[Z,B,R,C] -> [B,T,R]"""
    Z, B, R, C = x.shape
    return x.transpose(1, 0, 3, 2).reshape(B, Z * C, R)[:, :T]
