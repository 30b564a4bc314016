"""Matrix products with a stated precision: operands in the input dtype, accumulation in fp32.

default   operands as given (bf16 on the accelerators' fast path), fp32 accumulator
highest   fp32 (or float64) operands at full precision: no TF32, no bf16 passes
"""

import jax
import jax.numpy as jnp

__all__ = ["accumulator", "dot"]

_MODES = {"default": None, "highest": jax.lax.Precision.HIGHEST}


def accumulator(dtype) -> jnp.dtype:
    """Return the dtype of gates, states and sums: float64 for float64 inputs, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def dot(equation: str, lhs: jax.Array, rhs: jax.Array, mode: str = "default") -> jax.Array:
    """Contract two arrays of one dtype into the accumulator's dtype."""
    return jnp.einsum(
        equation,
        lhs,
        rhs,
        precision=_MODES[mode],
        preferred_element_type=accumulator(lhs.dtype),
    )
