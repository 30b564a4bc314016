"""One token of the gated delta rule on TPU: a kernel that reads the state once and writes it once.

The formulas are those of `step`. The state [H, E] of a head lies in registers while both products
with it and the new state are made; the rest of the operands is small and arranged by XLA: k and q
as columns, and per head the rows decay, beta, v and q.k.

    B batch   K key heads   R value heads   J blocks of N heads   H key dim   E value dim
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import decline
from pallas_kernels.gated_delta_rule import step
from pallas_kernels.gated_delta_rule.pallas_tpu import HEAD_DIMS, NAME, check_device

__all__ = ["apply", "check", "check_device"]

KERNEL_NAME = "gdn_step"
MAX_HEADS = 16  # of a block; 1 MiB of state


def check(params) -> None:
    """Decline what the kernel is not written for."""
    if params.dtype not in (jnp.bfloat16, jnp.float32):
        raise decline(NAME, "takes bfloat16 or float32", params.dtype)
    dims = params.shape_q[-1], params.shape_v[-1]
    if not set(dims) <= set(HEAD_DIMS):
        raise decline(NAME, f"needs key and value dims in {HEAD_DIMS}", dims)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(params, q, k, v, g, beta, state):
    """Advance the state by one token; return (o [B,R,E], state)."""
    (B, R, H, E), groups = state.shape, v.shape[1] // q.shape[1]
    N = max(n for n in range(1, MAX_HEADS + 1) if R % n == 0)
    J = R // N
    q, k = (jnp.repeat(x.astype(jnp.float32), groups, 1) for x in (q, k))
    columns = jnp.concatenate([_blocks(k, J, N), _blocks(q, J, N)], 2).swapaxes(2, 3)
    qk = jnp.sum(q * k, -1)
    rows = [jnp.broadcast_to(x[..., None], (B, R, E)) for x in (jnp.exp(g), beta, qk)]
    rows = jnp.stack([_blocks(x, J, N) for x in (v.astype(jnp.float32), *rows)], 2)
    of_state = pl.BlockSpec((1, N, H, E), lambda b, j: (b, j, 0, 0))
    o, state = pl.pallas_call(
        functools.partial(_kernel, params.scale, N),
        grid=(B, J),
        in_specs=[
            pl.BlockSpec((1, 1, H, 2 * N), lambda b, j: (b, j, 0, 0)),
            pl.BlockSpec((1, 1, 4, N, E), lambda b, j: (b, j, 0, 0, 0)),
            of_state,
        ],
        out_specs=[pl.BlockSpec((1, 1, N, E), lambda b, j: (b, j, 0, 0)), of_state],
        out_shape=[
            jax.ShapeDtypeStruct((B, J, N, E), v.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ],
        input_output_aliases={2: 1},  # in place where the caller gives the state away
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=7 * state.size,
            transcendentals=0,
            bytes_accessed=4 * (2 * state.size + columns.size + rows.size),
        ),
        name=KERNEL_NAME,
    )(columns, rows, state)
    return o.reshape(v.shape), state


def _kernel(scale: float, heads: int, columns, rows, state, o, new):
    for h in range(heads):
        s = state[0, h]
        k, q = (columns[0, 0, :, i : i + 1] for i in (h, heads + h))
        v, decay, beta, qk = (rows[0, 0, i, h : h + 1, :] for i in range(4))
        u = beta * (v - decay * jnp.sum(s * k, 0, keepdims=True))
        read = decay * jnp.sum(s * q, 0, keepdims=True)
        o[0, 0, h : h + 1, :] = (scale * (read + qk * u)).astype(o.dtype)
        new[0, h] = decay * s + k * u


def _blocks(x, count: int, heads: int):
    """[B, R, n] -> [B, J, N, n]"""
    return x.reshape(x.shape[0], count, heads, x.shape[2])


def _forward(params, *operands):
    return apply(params, *operands), operands


def _backward(params, operands, cotangents):
    return jax.vjp(functools.partial(step.apply, params), *operands)[1](cotangents)


apply.defvjp(_forward, _backward)
