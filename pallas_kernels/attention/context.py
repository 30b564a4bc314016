"""Attention over rows whose tokens are split over a mesh axis: queries meet all keys.

Keys and values are gathered; backward their gradients are summed and scattered again. A key head of
128 dims is 512 bytes a token in bf16. Under a causal mask the last part would see the most keys and
the others wait for it, so devices exchange halves of their queries: of 2 W pieces device j takes j
and 2 W - 1 - j, which see as much together as any other two.

    B batch   T query tokens of a part   S key tokens   K key heads   H head dim   W devices
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.rows import run_numbers

__all__ = ["attend"]


def attend(
    axis_name: str, run: Callable, q, k, v, segment_ids, q_offset, *, balance: bool
) -> Array:
    """o of a part's queries by `run(q, k, v, segment_ids, q_offset)`, whose keys are all there.

    `segment_ids` are given to it as a pair or None, run numbers of the whole rows where one array
    came in; `balance` exchanges queries.
    """
    T, part = q.shape[1], jax.lax.axis_index(axis_name).astype(jnp.int32)

    def whole(x: Array) -> Array:
        return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)

    k, v, ids = whole(k), whole(v), None
    if isinstance(segment_ids, tuple):
        ids = tuple(map(whole, segment_ids))
    elif segment_ids is not None:
        # Runs are counted over the whole row: an id that comes back is another document.
        ids = (run_numbers(whole(segment_ids)),) * 2

    def queries(q: Array, start: Array) -> Array:
        own = None
        if ids is not None:
            own = jax.lax.dynamic_slice_in_dim(ids[0], start, q.shape[1], 1), ids[1]
        return run(q, k, v, own, q_offset + start)

    parts = jax.lax.axis_size(axis_name)
    if not balance or parts == 1 or T % 2:
        return queries(q, part * T)
    halves = []
    for half, (sent, piece) in zip(jnp.split(q, 2, axis=1), _exchanges(parts), strict=True):
        there = jax.lax.ppermute(half, axis_name, sent)
        o = queries(there, jnp.asarray(piece)[part] * (T // 2))
        halves.append(jax.lax.ppermute(o, axis_name, [(j, i) for i, j in sent]))
    return jnp.concatenate(halves, axis=1)


def _exchanges(parts: int) -> list[tuple[list[tuple[int, int]], np.ndarray]]:
    """For first and second halves: who sends his to whom, and which piece each device then has."""
    found = []
    for side in (0, 1):
        pieces = [2 * i + side for i in range(parts)]
        sent = [(i, min(p, 2 * parts - 1 - p)) for i, p in enumerate(pieces)]
        held = np.zeros(parts, np.int32)
        for i, j in sent:
            held[j] = pieces[i]
        found.append((sent, held))
    return found
