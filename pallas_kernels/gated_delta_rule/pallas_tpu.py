"""The gated delta rule on TPU: what it takes, and its forward and backward in Pallas kernels.

`pallas_tpu_blocks` cuts the operands and arranges the gates, `pallas_tpu_forward` and
`pallas_tpu_backward` each hold one kernel that walks over the chunks with the state, or with its
gradient, in VMEM; `pallas_tpu_inverse` inverts the chunks inside the former (formulas: README).

    B batch   T tokens   K key heads   R value heads   Z chunks   C rows of a chunk
    H key dim   E value dim
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import decline
from pallas_kernels.gated_delta_rule.pallas_tpu_backward import backward_kernel
from pallas_kernels.gated_delta_rule.pallas_tpu_blocks import (
    BETA,
    KEEP,
    WRITE,
    cut,
    flat,
    gates,
    head_blocks,
    tokens,
)
from pallas_kernels.gated_delta_rule.pallas_tpu_forward import forward_kernel

NAME = "pallas_tpu"
CHUNKS = (64, 128)
HEAD_DIMS = (64, 128)


def check(params) -> None:
    """Decline what the kernels are not written for."""
    if params.dtype not in (jnp.bfloat16, jnp.float32):
        raise decline(NAME, "takes bfloat16 or float32", params.dtype)
    dims = params.shape_q[-1], params.shape_v[-1]
    if not set(dims) <= set(HEAD_DIMS):
        raise decline(NAME, f"needs key and value dims in {HEAD_DIMS}", dims)
    if params.config.chunk not in CHUNKS:
        raise decline(NAME, f"needs chunks of one of {CHUNKS}", params.config.chunk)
    heads = params.shape_q[-2], params.shape_v[-2]
    if head_blocks(*heads, dims) is None:
        raise decline(NAME, "needs blocks of heads with a multiple of 128 lanes", (heads, dims))


def check_device(kind: str | None) -> None:
    """Decline a device that is known to be no TPU."""
    if kind is not None and not kind.startswith("TPU"):
        raise decline(NAME, "runs on TPU", kind)


def forward(params, q, k, v, g, beta, runs, initial_state):
    """Return (o, last state, inverses X [Z,B,R,C,C], states at the chunk starts [Z,B,R,H,E]).

    The last two only if `params.residuals`.
    """
    blocks, C = cut(params), params.config.chunk
    o, *rest = forward_kernel(
        blocks,
        params.scale,
        params.residuals,
        flat(q, C),
        flat(k, C),
        flat(v, C),
        gates(blocks, g, beta, runs),
        initial_state,
    )
    return o[:, : v.shape[1]].reshape(v.shape), *rest


def backward(params, q, k, v, g, beta, runs, initial_state, x, states, do, dstate):
    """Return the gradients of q, k, v, g, beta and the initial state."""
    del initial_state  # it is states[0]
    blocks, C = cut(params, reverse=True), params.config.chunk
    T, gate = q.shape[1], gates(blocks, g, beta, runs)
    dq, dk, dv, sums, kept, dstate = backward_kernel(
        blocks,
        params.scale,
        flat(q, C),
        flat(k, C),
        flat(v, C),
        gate,
        x,
        states,
        flat(do, C),
        dstate,
    )
    i0, i1, i2 = sums[:, :, :, 0], sums[:, :, :, 1], sums[:, :, :, 2]
    written = gate.rows[:, :, :, WRITE] * i2
    kept = gate.rows[:, :, :, KEEP, :, :1] * jnp.sum(kept[:, :, :, 0], -1, keepdims=True)
    dc = i0 + gate.rows[:, :, :, BETA] * i1 - written
    last = jnp.sum(written, -1, keepdims=True) + kept
    dg = last + jax.lax.cumsum(dc, axis=4, reverse=True)

    def summed(x):  # over the blocks of value heads that share a key head
        x = x[:, :T].reshape(*q.shape[:2], -1, blocks.sharing, q.shape[3])
        x = jnp.sum(x.astype(jnp.float32), 3) if blocks.sharing > 1 else x[:, :, :, 0]
        return x[:, :, : q.shape[2]].astype(q.dtype)

    return (
        summed(dq),
        summed(dk),
        dv[:, :T].reshape(v.shape),
        tokens(dg, g.shape),
        tokens(i1 + gate.z * i2, g.shape),
        dstate,
    )
