"""Ablation: what is lost when heads give their mean, or nothing, in place of their output.

    O_n <- mean over tokens of O_n, or 0          everything downstream is recomputed

All N heads of a layer are ablated at once, as N streams that start from the layer's clean
residual: L·N ablations cost half as many forward passes as they would from the tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.losses import next_tokens
from hydrajax.model import Model
from hydrajax.selection import patching, streams
from hydrajax.selection.probes import Batch
from hydrajax.typing import Array, Float

LOGIT_TOKENS = 8192  # tokens, of all streams, whose logits exist at a time

Rows = dict[str, np.ndarray]  # tokens, segment_ids, positions, loss_mask; each [B, T]
Read = Callable[[Float[Array, "R T D"]], Float[Array, "R"]]  # a number of each finished stream


def head_sums(model: Model, batch: Rows) -> Float[Array, "L N H"]:
    """Output of every head summed over the batch's tokens, padding left out."""
    x, seq = streams.begin(model, *(batch[k] for k in ("tokens", "segment_ids", "positions")))
    sums = []
    for block in model.layers:
        x, _, o_BTNH = streams.tapped(block, x, seq)
        sums.append(streams.token_sum(o_BTNH, seq.segment_ids))
    return jnp.stack(sums)


def each_head(
    model: Model, batch: Rows, values: Float[Array, "L N H"], read: Read
) -> Float[Array, "L B N"]:
    """`read` of the batch with each head in turn at its value: one row of streams per row."""
    x, seq = streams.begin(model, *(batch[k] for k in ("tokens", "segment_ids", "positions")))
    heads, out = np.arange(values.shape[1]), []
    many = streams.widen(seq, len(heads))
    for l, block in enumerate(model.layers):
        after, attn_out, o_BTNH = streams.tapped(block, x, seq)
        x_RTD = streams.shifted(block, x, attn_out, values[l] - o_BTNH, heads)
        for later in list(model.layers)[l + 1 :]:
            x_RTD = streams.plain(later, x_RTD, many)
        out.append(read(x_RTD).reshape(x.shape[0], -1))
        x = after
    return jnp.stack(out)


def loss_rise(model: Model, batch: Rows, values: Float[Array, "L N H"]) -> Float[Array, "L N"]:
    """Rise of the summed loss of plain text, in nats, by single-head ablation."""
    targets, weights = next_tokens({k: jnp.asarray(v) for k, v in batch.items()})

    def nats(x_RTD):
        return _nats(model, x_RTD, targets, weights)

    x, seq = streams.begin(model, *(batch[k] for k in ("tokens", "segment_ids", "positions")))
    for block in model.layers:
        x = streams.plain(block, x, seq)
    return (each_head(model, batch, values, nats) - nats(x)[:, None]).sum(1)


def drops(model: Model, batch: Batch, values: Float[Array, "L N H"]) -> Float[Array, "B L N"]:
    """Drop of the answer's metric by ablation, as a share of m(x) - m(x'): 1 = all is lost."""
    direction_BPD = patching.answer_direction(model, batch)

    def metric(x_RTD):
        many = x_RTD.shape[0] // len(batch.at)
        x_RPD = streams.gather(x_RTD, np.repeat(batch.at, many, axis=0))
        wide = streams.repeat(direction_BPD, many)
        return patching.metric(streams.final_norm(model.norm, x_RPD), wide)

    clean, corrupt = patching.read_both(model, batch)
    m_B, other_B = (patching.metric(r.x, direction_BPD) for r in (clean, corrupt))
    ablated_LBN = each_head(model, prompts(batch), values, metric)
    return jnp.moveaxis((m_B[:, None] - ablated_LBN) / (m_B - other_B)[:, None], 0, 1)


def prompt_means(model: Model, parts: list[Batch]) -> Float[Array, "L N H"]:
    """Mean output of every head over the clean prompts."""
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in parts)
    return sum(head_sums(model, prompts(batch)) for batch in parts) / tokens


def prompts(batch: Batch) -> Rows:
    """The clean prompts of a batch as rows of text."""
    return {"tokens": batch.clean, "segment_ids": batch.segment_ids, "positions": None}


def scored_tokens(batch: Rows) -> float:
    """Tokens, by weight, that `loss_rise` sums over."""
    return float(next_tokens({k: jnp.asarray(v) for k, v in batch.items()})[1].sum())


@jax.jit
def _nats(model: Model, x: Float[Array, "R T D"], targets, weights) -> Float[Array, "R"]:
    """Cross entropy of each stream, summed over its tokens, a piece of the token axis at a time."""
    rows, tokens = x.shape[:2]
    most = max(1, LOGIT_TOKENS // rows)
    piece = next(t for t in range(min(tokens, most), 0, -1) if tokens % t == 0)
    wide = [jnp.repeat(a, rows // len(a), axis=0) for a in (x, targets, weights)]
    pieces = [
        jnp.moveaxis(a.reshape(rows, tokens // piece, piece, *a.shape[2:]), 1, 0) for a in wide
    ]

    def nats(of_piece):
        x_RtD, targets_Rt, weights_Rt = of_piece
        logits = model.logits(model.norm(x_RtD))
        picked = jnp.take_along_axis(logits, targets_Rt[..., None], axis=-1)[..., 0]
        return jnp.sum(weights_Rt * (jax.nn.logsumexp(logits, axis=-1) - picked), axis=1)

    return jax.lax.map(nats, pieces).sum(0)
