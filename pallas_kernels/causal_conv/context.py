"""The causal convolution over rows whose tokens are split over a mesh axis: W - 1 tokens of halo.

B batch   T tokens of a part   W taps   C channels
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import rows

__all__ = ["halo", "of_last_part"]


def halo(
    axis_name: str,
    last_inputs: Float[Array, "B W-1 C"],
    initial_state: Float[Array, "B W-1 C"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B W-1 C"]:
    """The inputs before a part: the last ones of the part before, if they are of its document."""
    before = rows.from_left(last_inputs, axis_name)
    if segment_ids is not None:
        before = jnp.where(rows.goes_on(segment_ids, axis_name)[:, None, None], before, 0)
    return jnp.where(rows.first(axis_name), initial_state, before)


def of_last_part(axis_name: str, last_inputs: Float[Array, "B W-1 C"]) -> Array:
    """The last inputs of the whole rows, on every device."""
    return jax.lax.all_gather(last_inputs, axis_name)[-1]
