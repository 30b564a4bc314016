"""The gated delta rule over rows whose tokens are split over a mesh axis, exactly.

A part of a row is an affine map of the state, from S before it to S' behind it:

    S' = M S + F       F = its last state from S = 0       M = its last state from S = I with v = 0
    dS = M^T dS' + D   D = its gradient of S from dS' = 0

so two runs of the op give a part's map. The maps of all parts, [H,H] and [H,E] a head however long
a part is, are gathered and applied one after another; each device then knows the state before its
part, and runs the op from there. Backward the same with D. Every implementation of the op serves,
at the price of two more of its forwards and one more of its backwards.

    N parts   B batch   T tokens of a part   R value heads   H key dim (f a second one)
    E value dim
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from pallas_kernels import rows
from pallas_kernels.precision import dot

__all__ = ["over_parts"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_parts(
    op,
    axis_name: str,
    arrays: tuple[Array, ...],
    segment_ids: Int[Array, "B T"] | None,
    initial_state: Float[Array, "B R H E"],
) -> tuple[Float[Array, "B T R E"], Float[Array, "B R H E"]]:
    """Return the part's outputs and, on every device, the last state of the whole rows.

    `op(*arrays, segment_ids=, initial_state=)` runs one part; arrays are q, k, v, g and beta.
    """
    start, end, _ = _states(op, axis_name, arrays, segment_ids, initial_state)
    o, _ = op(*arrays, segment_ids=segment_ids, initial_state=start)
    return o, end


def _over_parts_fwd(op, axis_name, arrays, segment_ids, initial_state):
    states = _states(op, axis_name, arrays, segment_ids, initial_state)
    start, end, factor = checkpoint_name(states, "gdn_parts")
    (o, _), backward = jax.vjp(
        lambda arrays, start: op(*arrays, segment_ids=segment_ids, initial_state=start),
        arrays,
        start,
    )
    return (o, end), (backward, factor, segment_ids)


def _over_parts_bwd(op, axis_name, residuals, cotangents):
    backward, factor, segment_ids = residuals
    do, dend = cotangents
    dend = jax.lax.psum(dend, axis_name)  # every device returned that state
    _, added = backward((do, jnp.zeros_like(dend)))
    maps = jax.lax.all_gather((factor, _joined(axis_name, added, segment_ids)), axis_name)

    def part(dstate, map):
        factor, added = map
        return dot("brhf,brhe->brfe", factor, dstate, "highest") + added, dstate

    dstart, behind = jax.lax.scan(part, dend, maps, reverse=True)
    darrays, _ = backward((do, behind[jax.lax.axis_index(axis_name)]))
    # All devices hold the same initial state: its gradient is the sum of theirs.
    dstart = jnp.where(rows.first(axis_name), dstart, 0)
    ids = None if segment_ids is None else np.zeros(segment_ids.shape, jax.dtypes.float0)
    return darrays, ids, dstart


over_parts.defvjp(_over_parts_fwd, _over_parts_bwd)


def _states(op, axis_name, arrays, segment_ids, initial_state) -> tuple[Array, Array, Array]:
    """The states before this part and behind the last one, and M of this part [B,R,H,H].

    M is 0 where a document begins with the part or in it.
    """
    factor, added = _map(op, arrays, segment_ids)
    factor = _joined(axis_name, factor, segment_ids)
    maps = jax.lax.all_gather((factor, added), axis_name)

    def part(state, map):
        factor, added = map
        return dot("brhf,brfe->brhe", factor, state, "highest") + added, state

    end, before = jax.lax.scan(part, initial_state, maps)
    start = _joined(axis_name, before[jax.lax.axis_index(axis_name)], segment_ids)
    return start, end, factor


def _map(op, arrays, segment_ids) -> tuple[Array, Array]:
    """M [B,R,H,H] and F [B,R,H,E] of this part, for a state of its first document."""
    _, k, v, g, beta = arrays
    run = functools.partial(op, k, k, segment_ids=segment_ids)  # outputs are of no use: any q
    (B, _, R, E), H = v.shape, k.shape[-1]
    _, added = run(v, g, beta, initial_state=jnp.zeros((B, R, H, E), g.dtype))
    one = jnp.broadcast_to(jnp.eye(H, dtype=g.dtype), (B, R, H, H))
    _, factor = run(jnp.zeros((*v.shape[:-1], H), v.dtype), g, beta, initial_state=one)
    return factor, added


def _joined(axis_name, x, segment_ids) -> Array:
    """x [B,...], but 0 in rows in which a document begins with the part."""
    if segment_ids is None:
        return x
    kept = rows.goes_on(segment_ids, axis_name).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(kept, x, 0)
