"""What a few batches through the teacher say about initial decay, write strength and loudness.

The teacher is walked block by block on the host, and so are the student's branches: blocks of one
shape share one small program, where one program for the whole walk would take minutes to compile.

Sources: Taylor-Calibrate (2606.16429) for `taylor`; `calibrated` and `ols` are ours.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.attention import FullHeads
from hydrajax.config import HydraConfig
from hydrajax.deltanet import LinearHeads
from hydrajax.head_plan import HeadPlan
from hydrajax.hydra import HydraAttention
from hydrajax.layers import Sequence
from hydrajax.model import Block, Model
from hydrajax.typing import Array, Float, Int, Params

GATE_RMS_FLOOR = 0.05
DECAY_RANGE = (1e-3, 5.0)
MIN_LOOK_BACK = 0.5
TAYLOR_ROWS, TAYLOR_TOKENS = 4, 256

Rows = dict[str, np.ndarray]


def recurrence(teacher: Model, hydra: HydraConfig, plan: HeadPlan, batch: Rows) -> Params:
    """Decay from each head's mean look-back distance, write strength from its entropy.

    A head that looks back d tokens on average gets a half-life of d: g = -ln 2 / d. A head with
    flat attention writes weakly (beta 0.3), a peaked one strongly (0.7). 4 x 256 tokens.
    """
    rows = {k: jnp.asarray(v[:TAYLOR_ROWS, :TAYLOR_TOKENS]) for k, v in batch.items()}
    out: Params = {}
    for l, block, x, _, seq in _walk(teacher, rows):
        la = np.array(plan.layer(l).la, int)
        if not len(la):
            continue
        distance, entropy = (a[la] for a in jax.device_get(_look_back(block, x, seq)))
        decay = np.clip(math.log(2) / np.maximum(distance, MIN_LOOK_BACK), *DECAY_RANGE)
        beta = 0.3 + 0.4 * (1 - entropy)
        beta = beta / 2 if hydra.neg_eigval else beta  # the layer doubles its sigmoid then
        prefix = f"layers.{l}.attn.la"
        out |= {
            f"{prefix}.a_log": np.zeros(len(la)),
            f"{prefix}.w_a": np.zeros((teacher.cfg.width, len(la))),
            f"{prefix}.dt_bias": inverse_softplus(decay),
            f"{prefix}.beta_bias": np.log(beta) - np.log1p(-beta),
        }
    return {path: jnp.asarray(v, jnp.float32) for path, v in out.items()}


def loudness(teacher: Model, student: Model, batches: list[Rows], rule: str) -> Params:
    """gamma_n so that each head speaks as loudly to W_O as the teacher's did.

    With u = what the fusion gives at gamma = 1: `calibrated` RMS(O_teacher) / RMS(u) (divisor
    floored at 0.05), `ols` <O_teacher, u> / |u|^2.
    """
    own_heads = scaled_heads(student)
    sums = np.zeros((3, len(teacher.layers), teacher.cfg.num_heads))
    for rows in batches:
        for l, _, x, o, seq in _walk(teacher, {k: jnp.asarray(v) for k, v in rows.items()}):
            for heads, u in _spoken(student.layers[l].attn, x, seq, set(own_heads.get(l, ()))):
                at = np.array(heads)
                sums[:, l, at] += jax.device_get(_power(u, o[:, :, at], seq.segment_ids))
    elements = sum(int((b["segment_ids"] > 0).sum()) for b in batches) * teacher.cfg.head_dim
    target, own, cross = sums
    if rule == "ols":
        gamma = cross / np.maximum(own, 1e-12)
    else:
        rms_target, rms_own = np.sqrt(target / elements), np.sqrt(own / elements)
        gamma = rms_target / np.maximum(rms_own, GATE_RMS_FLOOR)
    return {
        f"layers.{l}.attn.fusion.gamma": jnp.asarray(gamma[l, np.array(heads, int)], jnp.float32)
        for l, heads in own_heads.items()
    }


def scaled_heads(student: Model) -> dict[int, tuple[int, ...]]:
    """The heads that a layer's gamma belongs to, in its order; layers without gamma are absent."""
    out = {}
    for l, block in enumerate(student.layers):
        if block.attn.fusion.gamma is not None:
            layer = student.plan.layer(l)
            la_only = student.hydra.fusion == "la_only_norm"
            out[l] = layer.la if la_only else tuple(range(layer.num_heads))
    return out


def inverse_softplus(y: np.ndarray) -> np.ndarray:
    """x with log(1 + e^x) = y, y > 0."""
    return y + np.log(-np.expm1(-y))


def _walk(teacher: Model, rows: dict[str, Array]) -> Iterator[tuple]:
    """(l, block, its attention input [B, T, D], its head outputs [B, T, N, H], sequence)."""
    x = teacher.embed(rows["tokens"])
    # As in training: the student's branches must not meet the scale that only inference has.
    shape = rows["tokens"].shape
    seq = teacher.sequence(shape, rows["segment_ids"], rows["positions"], training=True)
    for l, block in enumerate(teacher.layers):
        after, attn_in, head_out = _tapped(block, x, seq)
        yield l, block, attn_in, head_out, seq
        x = after


@jax.jit
def _tapped(block: Block, x: Float[Array, "B T D"], seq: Sequence) -> tuple[Array, Array, Array]:
    after, taps = block(x, seq)
    return after, taps["attn_in"], taps["head_out"]


@jax.jit
def _look_back(
    block: Block, x: Float[Array, "B T D"], seq: Sequence
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Mean look-back distance in tokens, and entropy / ln(context), of every head."""
    q, k, _ = block.attn.fa.qkv(x, seq, None)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    segments, length = seq.segment_ids, x.shape[1]
    back = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    mask = (back >= 0) & (segments[:, :, None] == segments[:, None, :])
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    p = jax.nn.softmax(jnp.where(mask[:, None], logits * q.shape[-1] ** -0.5, -1e30))
    context = jnp.log(jnp.maximum(seq.positions + 1, 2))
    distance = jnp.einsum("bnts,ts->bnt", p, back.astype(jnp.float32))
    entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1) / context[:, None]
    scored = ((segments > 0) & (seq.positions > 0)).astype(jnp.float32)  # one key has no choice
    mean = lambda a: jnp.einsum("bnt,bt->n", a, scored) / jnp.sum(scored)  # noqa: E731
    return mean(distance), mean(entropy)


def _spoken(attn: HydraAttention, x: Array, seq: Sequence, wanted: set[int]) -> Iterator[tuple]:
    """(heads, what fusion makes of them [B, T, heads, H], fp32) of each branch with wanted heads.

    The fusion modes that have a gamma treat every head by itself, so branches go one by one.
    """
    x = x.astype(jnp.float32)
    kv_fa, kv_la = attn.tied(x)
    if wanted.intersection(attn.plan.fa):
        yield attn.plan.fa, attn.fusion(x, _branch(attn.fa, x, seq, kv_fa), None)
    if wanted.intersection(attn.plan.la):
        yield attn.plan.la, attn.fusion(x, None, _branch(attn.la, x, seq, kv_la))


@jax.jit
def _branch(
    heads: FullHeads | LinearHeads, x: Float[Array, "B T D"], seq: Sequence, kv: tuple | None
) -> tuple[Array, Array | None]:
    return heads(x, seq, kv), heads.gate(x)


@jax.jit
def _power(
    u: Float[Array, "B T N H"], target: Float[Array, "B T N H"], segment_ids: Int[Array, "B T"]
) -> Float[Array, "3 N"]:
    """Sums over tokens and dims of O_teacher^2, u^2 and O_teacher u, per head."""
    weights = (segment_ids > 0).astype(jnp.float32)
    target = target.astype(jnp.float32)
    pairs = (target * target, u * u, target * u)
    return jnp.stack([jnp.einsum("btnh,bt->n", p, weights) for p in pairs])
