"""Attention over rows whose tokens are split over a mesh axis: every part sees all keys.

Keys and values are gathered, queries stay where they are; backward their gradients are summed and
scattered again. A key head of 128 dims is 512 bytes a token in bf16.

    B batch   T query tokens of a part   S key tokens of a part   K key heads   H head dim
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.rows import run_numbers

__all__ = ["gather_keys"]


def gather_keys(axis_name: str, q, k, v, segment_ids, q_offset) -> tuple:
    """Return k, v, segment_ids and q_offset as one part's call of attention wants them."""
    T, part = q.shape[1], jax.lax.axis_index(axis_name)

    def whole(x: Array) -> Array:
        return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)

    if isinstance(segment_ids, tuple):
        segment_ids = segment_ids[0], whole(segment_ids[1])
    elif segment_ids is not None:
        # Runs are counted over the whole row: an id that comes back is another document.
        runs = run_numbers(whole(segment_ids))
        segment_ids = jax.lax.dynamic_slice_in_dim(runs, part * T, T, 1), runs
    offset = q_offset + part.astype(jnp.int32) * T
    return whole(k), whole(v), segment_ids, offset
