"""Attribution patching: a first-order estimate of every head's effect from one backward pass.

    atp_n = < dm/dO_n , O_n(x) - O_n(x') > / (m(x) - m(x'))        sum over all tokens and channels

(Nanda 2023; 2403.00745.) The gradient flows through everything downstream, so senders and
receivers are seen alike. It is exact where m is linear in O_n and misleads where softmax is
saturated: a rival and a tie-break, not a replacement of patching.
"""

import jax
import jax.numpy as jnp

from hydrajax.model import Block, Model
from hydrajax.selection import patching, streams
from hydrajax.selection.probes import Batch
from hydrajax.typing import Array, Float


def attributions(model: Model, batch: Batch) -> Float[Array, "B L N"]:
    """Estimated effects; keeps the residuals of both runs, and one layer's head outputs."""
    direction_BPD = patching.answer_direction(model, batch)
    x, seq = streams.begin(model, batch.clean, batch.segment_ids)
    y, _ = streams.begin(model, batch.corrupt, batch.segment_ids)
    inputs = []
    for block in model.layers:
        inputs.append((x, y))
        x, y = streams.plain(block, x, seq), streams.plain(block, y, seq)
    m_B, dx = _metric_gradient(model.norm, x, direction_BPD, batch.at)
    other_B, _ = _metric_gradient(model.norm, y, direction_BPD, batch.at)
    out = []
    for block, (x, y) in zip(reversed(list(model.layers)), reversed(inputs), strict=True):
        effect_BN, dx = _attribute(block, x, y, seq, dx)
        out.append(effect_BN)
    return jnp.stack(out[::-1], axis=1) / (m_B - other_B)[:, None, None]


@jax.jit
def _metric_gradient(norm, x: Float[Array, "B T D"], direction: Array, at: Array):
    def metric(x):
        m_B = patching.metric(norm(streams.gather(x, at)), direction)
        return m_B.sum(), m_B

    dx, m_B = jax.grad(metric, has_aux=True)(x)
    return m_B, dx


@jax.jit
def _attribute(block: Block, x: Float[Array, "B T D"], y: Array, seq, dx: Float[Array, "B T D"]):
    """Effects [B, N] of a layer's heads and the gradient at its input."""

    def run(x, extra):
        attn_out, o_BTNH = block.attn(block.attn_norm(x), seq)
        return block.after_attention(x + attn_out + extra), o_BTNH

    _, pull, o_BTNH = jax.vjp(run, x, jnp.zeros_like(x), has_aux=True)
    _, other_BTNH = block.attn(block.attn_norm(y), seq)
    dx, dy_BTD = pull(dx)
    do_BTNH = jnp.einsum("btd,nhd->btnh", dy_BTD, block.attn.w_o[...].astype(x.dtype))
    return jnp.einsum("btnh,btnh->bn", do_BTNH, o_BTNH - other_BTNH), dx
