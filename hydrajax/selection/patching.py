"""Patching: what one head's output does to the answer, with everything downstream frozen.

    m(x)  = Σ_j w_j (z_j[a+] - z_j[a-])        w_j ∝ λ^j, z the logits that predict answer token j
    IE_n  = (m(x) - m(x; O_n ← O_n(x'))) / (m(x) - m(x'))

Receivers need no sequence forward per head. When all later attention outputs keep their clean
values, the residual at a position depends on that position alone: add the head's change
(O_n(x') - O_n(x)) W_O,n to the residual at the readouts, and push these few vectors through the
remaining MLPs, the final norm and the unembedding of a+ and a- (HydraHead, 2606.20097, Eq. 9-10).

`M` counts the perturbed streams pushed together: the heads of a layer.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.model import Model, Taps
from hydrajax.selection import streams
from hydrajax.selection.probes import Batch
from hydrajax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class Readout:
    """What a run leaves at its readout positions."""

    x: Float[Array, "B P D"]  # after the final norm
    taps: Taps  # per layer, at the readouts only


def judge(model: Model, batch: Batch) -> tuple[Float[np.ndarray, "B"], Bool[np.ndarray, "B"]]:
    """Per pair: the gap m(x) - m(x'), and whether the teacher's argmax on x is the answer."""
    clean, corrupt = read_both(model, batch)
    return jax.device_get(_judge(model, clean.x, corrupt.x, batch))


def read_both(model: Model, batch: Batch) -> tuple[Readout, Readout]:
    """Clean and corrupt run of a batch."""
    return read(model, batch.clean, batch), read(model, batch.corrupt, batch)


def read(model: Model, tokens: Int[np.ndarray, "B T"], batch: Batch) -> Readout:
    """A forward pass block by block, of which only the readouts are kept."""
    x, seq = streams.begin(model, tokens, batch.segment_ids)
    resid, attn_out, head_out = [], [], []
    for block in model.layers:
        after, y_BTD, o_BTNH = streams.tapped(block, x, seq)
        for kept, value in ((resid, x), (attn_out, y_BTD), (head_out, o_BTNH)):
            kept.append(streams.gather(value, batch.at))
        x = after
    x_BPD = streams.final_norm(model.norm, streams.gather(x, batch.at))
    taps = Taps(resid=tuple(resid), attn_out=tuple(attn_out), head_out=tuple(head_out))
    return Readout(x_BPD, taps)


def receiver_effects(
    model: Model, clean: Readout, corrupt: Readout, batch: Batch
) -> Float[Array, "B L N"]:
    """IE of every head by the exact shortcut: no forward pass but those of `read_both`."""
    direction_BPD = answer_direction(model, batch)
    m_clean, m_corrupt = metric(clean.x, direction_BPD), metric(corrupt.x, direction_BPD)
    heads = zip(clean.taps.head_out, corrupt.taps.head_out, strict=True)
    patched = []
    for l, (o_BPNH, other_BPNH) in enumerate(heads):
        delta_MBPD = head_deltas(model.layers[l].attn.w_o[...], o_BPNH, other_BPNH)
        patched.append(patched_metric(model, l, delta_MBPD, clean, direction_BPD))
    return jnp.moveaxis((m_clean - jnp.stack(patched)) / (m_clean - m_corrupt), -1, 0)


def patched_metric(
    model: Model,
    layer: int,
    delta: Float[Array, "M B P D"],
    clean: Readout,
    direction: Float[Array, "B P D"],
) -> Float[Array, "M B"]:
    """m(x) after adding `delta` to a layer's attention output, later attention frozen at clean.

    One small compiled step serves every block, so compile time does not grow with depth. Its
    memory is M·B·P rows of the MLP: `select.rows` bounds it.
    """
    shape = delta.shape
    x_RPD = (clean.taps.resid[layer] + delta).swapaxes(0, 1).reshape(-1, *shape[2:])
    for l in range(layer, len(model.layers)):
        x_RPD = streams.frozen(model.layers[l], x_RPD, clean.taps.attn_out[l])
    x_BMPD = streams.final_norm(model.norm, x_RPD).reshape(shape[1], shape[0], *shape[2:])
    return metric(x_BMPD.swapaxes(0, 1), direction)


def answer_direction(model: Model, batch: Batch) -> Float[Array, "B P D"]:
    """w_j (W_U[a+] - W_U[a-]): the metric is linear in the normalised hidden state."""
    if model.unembed is None:
        w_VD = model.embed.w[...]
        columns = w_VD[batch.answer] - w_VD[batch.distractor]
    else:
        w_DV = model.unembed.w[...]
        columns = jnp.moveaxis(w_DV[:, batch.answer] - w_DV[:, batch.distractor], 0, -1)
    return columns.astype(jnp.float32) * batch.weight[..., None]


def copies(model: Model, batch: Batch) -> Float[Array, "B L N"]:
    """Share of answer tokens whose strongest attention falls on the token being copied."""
    x, seq = streams.begin(model, batch.clean, batch.segment_ids)
    out = []
    for block in model.layers:
        _, weights_BPNT = streams.attend_at(block, x, seq, batch.at)
        out.append(_share_on(weights_BPNT, batch))
        x = streams.plain(block, x, seq)
    return jnp.stack(out, axis=1)


@jax.jit
def metric(x: Float[Array, "... B P D"], direction: Float[Array, "B P D"]) -> Float[Array, "... B"]:
    """Decayed logit difference over the answer span."""
    return jnp.einsum("...bpd,bpd->...b", x.astype(jnp.float32), direction)


@jax.jit
def head_deltas(
    w_o: Float[Array, "N H D"], o: Float[Array, "B P N H"], other: Float[Array, "B P N H"]
) -> Float[Array, "N B P D"]:
    """What swapping each head's output writes into the residual."""
    return jnp.einsum("bpnh,nhd->nbpd", other - o, w_o.astype(o.dtype))


@jax.jit
def _share_on(weights: Float[Array, "B P N T"], batch: Batch) -> Float[Array, "B N"]:
    counts_BP1 = (batch.weight > 0)[..., None]
    hit_BPN = (weights.argmax(-1) == batch.source[..., None]) & counts_BP1
    return hit_BPN.sum(1) / counts_BP1.sum(1)


@jax.jit
def _judge(model: Model, clean_BPD, corrupt_BPD, batch: Batch) -> tuple[Array, Array]:
    direction_BPD = answer_direction(model, batch)
    gap_B = metric(clean_BPD, direction_BPD) - metric(corrupt_BPD, direction_BPD)
    hit_BP = model.logits(clean_BPD).argmax(-1) == batch.answer
    return gap_B, jnp.all(hit_BP | (batch.weight == 0), axis=-1)
