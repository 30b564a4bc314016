"""One token of the gated delta rule on Ampere and Ada: what it takes, and the call of the kernel.

The state is updated where it lies if the caller of the jitted program donates it.

    B batch   K key heads   R value heads   H key dim   E value dim
"""

import functools

import jax

from pallas_kernels.gated_delta_rule import step, triton_gpu, triton_gpu_launch


def check(params) -> None:
    """Decline without jax-triton and what the kernel is not written for."""
    triton_gpu.check_operands(params)
    triton_gpu_launch.jax_triton()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(params, q, k, v, g, beta, state):
    """Advance the state by one token; return (o [B,R,E], state)."""
    from pallas_kernels.gated_delta_rule.triton_gpu_step_kernel import advance

    return advance(params.scale, q, k, v, g, beta, state)


def _forward(params, *operands):
    return apply(params, *operands), operands


def _backward(params, operands, cotangents):
    return jax.vjp(functools.partial(step.apply, params), *operands)[1](cotangents)


apply.defvjp(_forward, _backward)
