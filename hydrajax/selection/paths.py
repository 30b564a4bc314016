"""Senders: heads that reach the answer through other heads, by path patching.

    1  clean run with O_u <- O_u(x'), all other attention outputs frozen, MLPs recomputed
    2  q, k, v and output of every receiver, recomputed from these residuals
    3  clean run with the receivers' outputs alone replaced, downstream frozen -> IE_send of u

(HydraHead, 2606.20097, Eq. 11; path patching after Wang et al., 2211.00593.) With downstream
frozen, step 3 needs the receivers at the readouts alone, as in `patching`; step 2 then needs their
queries there and their keys everywhere, and step 1 is MLPs. In a second round the senders found in
the first are carriers: recomputed in step 1 as well, so that a head counts that reaches the
receivers through them. A round without carriers is the plain path patch.

The paper does not say whether attention behind the receivers is frozen in step 3. With `freeze` off
it is recomputed there, from the first receiver's layer to the last, of the whole sequence.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.layers import Sequence
from hydrajax.model import Model
from hydrajax.selection import patching, streams
from hydrajax.selection.probes import Batch
from hydrajax.typing import Array, Bool, Float


@dataclass(frozen=True)
class Roles:
    """Which heads do what in one round."""

    senders: Bool[np.ndarray, "L N"]  # whose effects are wanted
    receivers: Bool[np.ndarray, "L N"]
    carriers: Bool[np.ndarray, "L N"]

    @property
    def last(self) -> int:
        """The last layer with a receiver, -1 if there is none."""
        return int(np.flatnonzero(self.receivers.any(1)).max(initial=-1))


@dataclass(frozen=True)
class Clean:
    """The clean run of a batch: residuals at each block's input and what attention wrote."""

    seq: Sequence
    resid: list[Float[Array, "B T D"]]
    attn_out: list[Float[Array, "B T D"]]
    head_out: dict[int, Float[Array, "B T N H"]]  # of layers with carriers
    head_out_at: dict[int, Float[Array, "B P N H"]]  # of layers with receivers
    resid_at: list[Float[Array, "B P D"]]
    attn_out_at: list[Float[Array, "B P D"]]
    metric: Float[Array, "B"]
    gap: Float[Array, "B"]  # m(x) - m(x')


def sender_effects(
    model: Model, batch: Batch, roles: Roles, freeze: bool = True
) -> Float[np.ndarray, "B L N"]:
    """IE_send of the wanted heads on each pair of a batch; 0 for the others."""
    direction_BPD = patching.answer_direction(model, batch)
    clean = _run_clean(model, batch, roles, direction_BPD)
    x_BTD, seq = streams.begin(model, batch.corrupt, batch.segment_ids)
    y_BTD = clean.resid[0]
    out = np.zeros((len(batch.at), *roles.senders.shape))
    for l in range(roles.last):  # a head of the last receiver's layer reaches none
        x_BTD, _, other_BTNH = streams.tapped(model.layers[l], x_BTD, seq)
        y_BTD, _, o_BTNH = streams.tapped(model.layers[l], y_BTD, clean.seq)
        for heads, count in _portions(np.flatnonzero(roles.senders[l]), roles.senders.shape[1]):
            delta_BTMH = (other_BTNH - o_BTNH)[:, :, heads]
            x_RTD = streams.shifted(
                model.layers[l], clean.resid[l], clean.attn_out[l], delta_BTMH, heads
            )
            if freeze:
                moved = _follow(model, l + 1, x_RTD, clean, (roles, batch))
                m_BM = _read_out(model, moved, clean, direction_BPD)
            else:
                m_BM = _live(model, l + 1, x_RTD, clean, (roles, batch), direction_BPD)
            effect_BM = (clean.metric[:, None] - m_BM) / clean.gap[:, None]
            out[:, l, heads[:count]] = jax.device_get(effect_BM)[:, :count]
    return out


def _portions(heads: np.ndarray, most: int) -> list[tuple[np.ndarray, int]]:
    """Heads in groups of two sizes, each a compiled shape; the last is filled with its first."""
    size = most if len(heads) > most // 2 else -(-most // 4)
    parts = [heads[i : i + size] for i in range(0, len(heads), size)]
    return [(np.append(p, np.repeat(p[:1], size - len(p))), len(p)) for p in parts]


def _run_clean(model: Model, batch: Batch, roles: Roles, direction: Array) -> Clean:
    x, seq = streams.begin(model, batch.clean, batch.segment_ids)
    resid, attn_out, head_out, head_out_at, resid_at, attn_out_at = [], [], {}, {}, [], []
    for l, block in enumerate(model.layers):
        after, y_BTD, o_BTNH = streams.tapped(block, x, seq)
        resid.append(x)
        attn_out.append(y_BTD)
        resid_at.append(streams.gather(x, batch.at))
        attn_out_at.append(streams.gather(y_BTD, batch.at))
        if roles.carriers[l].any():
            head_out[l] = o_BTNH
        if roles.receivers[l].any():
            head_out_at[l], _ = streams.attend_at(block, x, seq, batch.at)
        x = after
    m = patching.metric(streams.final_norm(model.norm, streams.gather(x, batch.at)), direction)
    gap = m - patching.metric(patching.read(model, batch.corrupt, batch).x, direction)
    return Clean(seq, resid, attn_out, head_out, head_out_at, resid_at, attn_out_at, m, gap)


def _follow(
    model: Model, first: int, x: Float[Array, "R T D"], clean: Clean, what: tuple[Roles, Batch]
) -> dict[int, Float[Array, "R P D"]]:
    """Steps 1 and 2: what the receivers of each later layer write at the readouts, less clean."""
    roles, batch = what
    many = x.shape[0] // len(batch.at)
    at_RP, seq = np.repeat(batch.at, many, axis=0), streams.widen(clean.seq, many)
    moved = {}
    for l in range(first, roles.last + 1):
        block = model.layers[l]
        if roles.receivers[l].any():
            o_RPNH, _ = streams.attend_at(block, x, seq, at_RP)
            live_N = jnp.asarray(roles.receivers[l], jnp.float32)
            moved[l] = _change(block.attn.w_o[...], o_RPNH, clean.head_out_at[l], live_N)
        if l < roles.last:
            x = _step_1(block, l, x, clean, roles, seq)
    return moved


def _step_1(block, l: int, x: Float[Array, "R T D"], clean: Clean, roles: Roles, seq: Sequence):
    """A layer of step 1: attention is the clean run's, but the carriers'."""
    if not roles.carriers[l].any():
        return streams.frozen(block, x, clean.attn_out[l])
    live_N = jnp.asarray(roles.carriers[l], jnp.float32)
    return streams.carried(block, x, clean.attn_out[l], clean.head_out[l], live_N, seq)


def _live(
    model: Model, first: int, x: Float[Array, "R T D"], clean: Clean, what: tuple, direction: Array
) -> Float[Array, "B M"]:
    """All three steps without freezing in the third: the runs of steps 1 and 3 walk side by side.

    What is not a receiver is recomputed from step 3's own residual.
    """
    roles, batch = what
    many = x.shape[0] // len(batch.at)
    seq, y_RTD = streams.widen(clean.seq, many), None
    for l in range(first, len(model.layers)):
        block = model.layers[l]
        if roles.receivers[l].any():
            y_RTD = streams.repeat(clean.resid[l], many) if y_RTD is None else y_RTD
            live_N = jnp.asarray(roles.receivers[l], jnp.float32)
            y_RTD = streams.given(block, y_RTD, x, live_N, seq)
        elif y_RTD is not None:
            y_RTD = streams.plain(block, y_RTD, seq)
        if l < roles.last:
            x = _step_1(block, l, x, clean, roles, seq)
    y_RPD = streams.gather(y_RTD, np.repeat(batch.at, many, axis=0))
    m_R = patching.metric(streams.final_norm(model.norm, y_RPD), streams.repeat(direction, many))
    return m_R.reshape(-1, many)


@jax.jit
def _change(w_o, o: Float[Array, "R P N H"], clean: Float[Array, "B P N H"], live) -> Array:
    change = (o - jnp.repeat(clean, o.shape[0] // clean.shape[0], axis=0)) * live[:, None]
    return jnp.einsum("rpnh,nhd->rpd", change, w_o.astype(o.dtype))


def _read_out(model: Model, moved: dict, clean: Clean, direction: Array) -> Float[Array, "B M"]:
    """Step 3: the metric after these changes at the readouts, all other attention clean."""
    first = min(moved)
    many = moved[first].shape[0] // direction.shape[0]
    x_RPD = streams.repeat(clean.resid_at[first], many)
    for l in range(first, len(model.layers)):
        x_RPD = x_RPD + moved[l] if l in moved else x_RPD
        x_RPD = streams.frozen(model.layers[l], x_RPD, clean.attn_out_at[l])
    x_RPD = streams.final_norm(model.norm, x_RPD)
    m_R = patching.metric(x_RPD, streams.repeat(direction, many))
    return m_R.reshape(direction.shape[0], many)
