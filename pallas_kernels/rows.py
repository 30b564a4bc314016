"""Packed rows: the documents in them, and their parts when tokens are split over a mesh axis.

What takes an `axis_name` runs inside `jax.shard_map`; parts lie in order, the first on device 0.

    B batch   T tokens, of a part where rows are split
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

__all__ = ["first", "from_left", "goes_on", "run_numbers"]


def run_numbers(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number the runs of equal neighbours, so that an id that comes back does not join."""
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(change, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)


def first(axis_name: str) -> Bool[Array, ""]:
    """Whether this device holds the start of the rows."""
    return jax.lax.axis_index(axis_name) == 0


def from_left(x: Array, axis_name: str) -> Array:
    """The neighbour's x of the part before; 0 on the first device."""
    parts = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(x, axis_name, [(i, i + 1) for i in range(parts - 1)])


def goes_on(segment_ids: Int[Array, "B T"], axis_name: str) -> Bool[Array, "B"]:
    """Whether the document of a part's first token is the one that the part before ends with.

    True on the first device: what is before the rows belongs to their first document.
    """
    return (from_left(segment_ids[:, -1], axis_name) == segment_ids[:, 0]) | first(axis_name)
