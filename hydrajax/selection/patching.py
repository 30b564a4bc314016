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
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrajax.config import SelectConfig
from hydrajax.model import Block, Model, Taps, bind
from hydrajax.selection.probes import Batch, Pair, batches
from hydrajax.typing import Array, Bool, Float, Params

TAPS = ("resid", "attn_out", "head_out")


@dataclass(frozen=True)
class Readout:
    """What a run leaves at its readout positions."""

    x: Float[Array, "B P D"]  # after the final norm
    taps: Taps  # per layer, at the readouts only


jax.tree_util.register_dataclass(Readout, ["x", "taps"], [])


def judge(
    graphdef: nnx.GraphDef, params: Params, batch: Batch
) -> tuple[Float[np.ndarray, "B"], Bool[np.ndarray, "B"]]:
    """Per pair: the gap m(x) - m(x'), and whether the teacher's argmax on x is the answer."""
    clean, corrupt = read_both(graphdef, params, batch, taps=())
    return jax.device_get(_judge(bind(graphdef, params), clean.x, corrupt.x, batch))


def receivers(
    graphdef: nnx.GraphDef, params: Params, pairs: list[Pair], cfg: SelectConfig
) -> Float[np.ndarray, "Q L N"]:
    """Effects of all heads on each of Q pairs; two forwards and L·N pushes of the readouts."""
    model = bind(graphdef, params)
    effects = []
    for batch, rows in batches(pairs, cfg):
        clean, corrupt = read_both(graphdef, params, batch, taps=TAPS)
        effect_LNB = receiver_effects(model, clean, corrupt, batch)
        effects.append(np.moveaxis(jax.device_get(effect_LNB), -1, 0)[:rows])
    return np.concatenate(effects)


def read_both(
    graphdef: nnx.GraphDef, params: Params, batch: Batch, taps: tuple[str, ...]
) -> tuple[Readout, Readout]:
    """Clean and corrupt run of a batch."""
    read = partial(_read, graphdef, params, segment_ids=batch.segment_ids, at=batch.at, taps=taps)
    return read(batch.clean), read(batch.corrupt)


def receiver_effects(
    model: Model, clean: Readout, corrupt: Readout, batch: Batch
) -> Float[Array, "L N B"]:
    """IE of every head by the exact shortcut."""
    direction_BPD = answer_direction(model, batch)
    m_clean, m_corrupt = metric(clean.x, direction_BPD), metric(corrupt.x, direction_BPD)
    heads = zip(clean.taps.head_out, corrupt.taps.head_out, strict=True)
    patched = []
    for l, (o_BPNH, other_BPNH) in enumerate(heads):
        delta_MBPD = head_deltas(model.layers[l].attn.w_o[...], o_BPNH, other_BPNH)
        patched.append(patched_metric(model, l, delta_MBPD, clean, direction_BPD))
    return (m_clean - jnp.stack(patched)) / (m_clean - m_corrupt)


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
    x_MBPD = clean.taps.resid[layer] + delta
    for l in range(layer, len(model.layers)):
        x_MBPD = _frozen_block(model.layers[l], x_MBPD, clean.taps.attn_out[l])
    return metric(_final_norm(model.norm, x_MBPD), direction)


def answer_direction(model: Model, batch: Batch) -> Float[Array, "B P D"]:
    """w_j (W_U[a+] - W_U[a-]): the metric is linear in the normalised hidden state."""
    if model.unembed is None:
        w_VD = model.embed.w[...]
        columns = w_VD[batch.answer] - w_VD[batch.distractor]
    else:
        w_DV = model.unembed.w[...]
        columns = jnp.moveaxis(w_DV[:, batch.answer] - w_DV[:, batch.distractor], 0, -1)
    return columns.astype(jnp.float32) * batch.weight[..., None]


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


@partial(jax.jit, static_argnums=0, static_argnames="taps")
def _read(graphdef, params, tokens, *, segment_ids, at, taps) -> Readout:
    model = bind(graphdef, params)
    x_BTD, seen = model.hidden(tokens, segment_ids=segment_ids, taps=taps, tap_at=at)
    return Readout(jnp.take_along_axis(x_BTD, at[..., None], axis=1), seen)


@jax.jit
def _frozen_block(block: Block, x: Float[Array, "M B P D"], attn_out: Array) -> Array:
    return block.after_attention(x + attn_out)


@jax.jit
def _final_norm(norm: nnx.Module, x: Float[Array, "M B P D"]) -> Array:
    return norm(x)


@jax.jit
def _judge(model: Model, clean_BPD, corrupt_BPD, batch: Batch) -> tuple[Array, Array]:
    direction_BPD = answer_direction(model, batch)
    gap_B = metric(clean_BPD, direction_BPD) - metric(corrupt_BPD, direction_BPD)
    hit_BP = model.logits(clean_BPD).argmax(-1) == batch.answer
    return gap_B, jnp.all(hit_BP | (batch.weight == 0), axis=-1)
