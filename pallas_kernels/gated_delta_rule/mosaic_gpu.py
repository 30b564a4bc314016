"""The gated delta rule on NVIDIA Hopper: what it takes, and its forward in Mosaic GPU kernels.

`prepare` inverts I + A of all chunks at once, `recurrence` walks over the chunks of a head, or of
its segments, before which `segment_starts` gives the states where heads alone would leave most of
the chip idle (letters and formulas: README). Mosaic GPU, not the same in every jax, is imported
where a kernel is built.

    B batch   T tokens   K key heads   R value heads   Z chunks   C rows of a chunk
    H key dim   E value dim
"""

import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.dispatch import decline
from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import gate_rows, whole_chunks
from pallas_kernels.gated_delta_rule.mosaic_gpu_prepare import prepare
from pallas_kernels.gated_delta_rule.mosaic_gpu_recurrence import recurrence
from pallas_kernels.gated_delta_rule.mosaic_gpu_segments import choose_segments, segment_starts

CHUNK = 64
HEAD_DIMS = (64, 128)


def check(params) -> None:
    """Decline below jax 0.11 and what the kernels are not written for."""
    hopper.check_version()
    if params.dtype != jnp.bfloat16:
        raise decline(hopper.NAME, "takes bfloat16", params.dtype)
    dims = params.shape_q[-1], params.shape_v[-1]
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        raise decline(hopper.NAME, f"needs equal key and value dims in {HEAD_DIMS}", dims)
    if params.config.chunk != CHUNK:
        raise decline(hopper.NAME, f"needs chunks of {CHUNK}", params.config.chunk)


def forward(params, q, k, v, g, beta, runs, initial_state):
    """Return (o, last state, inverses [Z,B,R,C,C], states at the chunk starts [Z,B,R,H,E]).

    The states are None unless `params.residuals`.
    """
    T, C = q.shape[1], params.config.chunk
    gates = gate_rows(C, g, beta, runs)
    q, k, v = (whole_chunks(x, C) for x in (q, k, v))
    t_inv = prepare(k, gates)
    place = q.shape[0] * v.shape[2], gates.shape[0], q.shape[3]
    segments = choose_segments("forward", params.config, *place)
    start = initial_state.swapaxes(-1, -2)
    starts = segment_starts(k, v, gates, t_inv, start, segments)
    o, state, states = recurrence(params.scale, q, k, v, gates, t_inv, starts, params.residuals)
    return o[:, :T], state.swapaxes(-1, -2), t_inv, states
