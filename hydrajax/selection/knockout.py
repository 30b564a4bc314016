"""Knock-out: what is left of recall as heads are ablated one after the other, best score first.

A causal score is right if its order destroys recall at once while random orders of as many heads
hardly touch it. Ablated heads give their mean output, everything downstream is recomputed.

    AUC = area under the share of answer tokens said right, over the share of heads ablated,
          divided by the largest share: 1 = nothing is lost

Random orders may hit other layers than the score does. Depth-matched ones take, at every step, a
random head of the layer whose head the score takes there: what they keep is due to the head alone.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.layers import Sequence as Seq
from hydrajax.model import Block, Model
from hydrajax.selection import ablation, streams
from hydrajax.selection.probes import Batch, batches
from hydrajax.selection.scorers import Context
from hydrajax.typing import Array, Bool, Float, Int

ORDERS = 20  # random orders that make a band
RANDOM, MATCHED = slice(1, 1 + ORDERS), slice(1 + ORDERS, None)
POINTS = 10
STREAMS = 4  # ablated runs of a row that are walked together


@dataclass(frozen=True)
class Curve:
    """Share of answer tokens right, per order and point: by score, random, depth-matched."""

    counts: Int[np.ndarray, "C"]  # heads ablated
    right: Float[np.ndarray, "O C Q"]  # per order, point and pair; O = 1 + ORDERS (+ ORDERS)
    total: int  # heads in all

    @property
    def auc(self) -> Float[np.ndarray, "O"]:
        """Area of each order."""
        return area(self.counts, self.right.mean(-1))

    def band(self, orders: slice = RANDOM) -> tuple[float, float]:
        """95 % of the areas of the random orders, or of the depth-matched ones."""
        low, high = np.percentile(self.auc[orders], [2.5, 97.5])
        return float(low), float(high)

    def causal_band(self, draws: int = 1000) -> tuple[float, float]:
        """95 % of the areas by score when the pairs are drawn again."""
        rng, pairs = np.random.default_rng(0), self.right.shape[-1]
        again = rng.integers(pairs, size=(draws, pairs))
        areas = area(self.counts, self.right[0][:, again].mean(-1).T)
        low, high = np.percentile(areas, [2.5, 97.5])
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        """The curve as the report shows it."""
        shares = self.right.mean(-1)
        return {
            "heads": self.total,
            "pairs": self.right.shape[-1],
            "orders": ORDERS,
            "counts": self.counts.tolist(),
            "by_score": shares[0].tolist(),
            "random_mean": shares[RANDOM].mean(0).tolist(),
            "random_band": np.percentile(shares[RANDOM], [2.5, 97.5], axis=0).tolist(),
            "auc_by_score": float(self.auc[0]),
            "auc_by_score_band": self.causal_band(),
            "auc_random_band": self.band(),
        }


def measure(
    context: Context, score_LN: Float[np.ndarray, "L N"], per_probe: int, *, matched: bool = False
) -> Curve:
    """Curve of a score over the first pairs of each probe, up to the budget."""
    pairs = [pair for probe in context.probes for pair in probe.pairs[:per_probe]]
    parts = batches(pairs, context.cfg)
    counts = points(score_LN.size, context.cfg.ratio)
    keep = masks(orders(score_LN, context.cfg.seed, matched), counts, score_LN.shape)
    flat = keep.reshape(-1, *score_LN.shape)
    model = context.model
    with jax.default_matmul_precision("tensorfloat32"):
        means = ablation.prompt_means(model, [part for part, _ in parts])
        right = context.work.each(
            "knockout_matched" if matched else "knockout",
            parts,
            lambda part: share_right(model, part[0], flat, means)[:, : part[1]],
        )
    return Curve(counts, np.concatenate(right, axis=1).reshape(*keep.shape[:2], -1), score_LN.size)


def area(counts: Int[np.ndarray, "C"], right: Float[np.ndarray, "... C"]) -> np.ndarray:
    """Trapezoids over the counts, divided by the last one."""
    return np.trapezoid(right, counts, axis=-1) / counts[-1]


def points(total: int, ratio: float) -> Int[np.ndarray, "C"]:
    """Counts from 0 to the budget, dense where score orders do their harm."""
    last = max(int(ratio * total), 1)
    return np.unique(np.r_[0, np.round(np.geomspace(1, last, POINTS))]).astype(int)


def orders(
    score: Float[np.ndarray, "L N"], seed: int, matched: bool = False
) -> Int[np.ndarray, "O LN"]:
    """The order by score, random ones and, if asked for, depth-matched ones; flat head numbers."""
    rng = np.random.default_rng(seed)
    best = np.lexsort((rng.permutation(score.size), -score.ravel()))
    out = [best, *(rng.permutation(score.size) for _ in range(ORDERS))]
    for _ in range(ORDERS if matched else 0):
        renamed = rng.permuted(np.arange(score.size).reshape(score.shape), axis=1)
        out.append(renamed.ravel()[best])
    return np.stack(out)


def masks(order: Int[np.ndarray, "O LN"], counts: Int[np.ndarray, "C"], shape) -> np.ndarray:
    """Which heads stay: bool [O, C, L, N]."""
    keep = np.ones((len(order), len(counts), order.shape[1]), bool)
    for o, heads in enumerate(order):
        for c, count in enumerate(counts):
            keep[o, c, heads[:count]] = False
    return keep.reshape(*keep.shape[:2], *shape)


def share_right(
    model: Model, batch: Batch, keep: Bool[np.ndarray, "C L N"], means: Float[Array, "L N H"]
) -> Float[np.ndarray, "C B"]:
    """Share of answer tokens that are the argmax, under each of C sets of kept heads."""
    out = []
    for i in range(0, len(keep), STREAMS):
        part = keep[i : i + STREAMS]
        filled = np.concatenate([part, np.repeat(part[:1], STREAMS - len(part), axis=0)])
        out.append(jax.device_get(_share_right(model, batch, filled, means))[: len(part)])
    return np.concatenate(out)


def _share_right(model: Model, batch: Batch, keep: np.ndarray, means) -> Float[Array, "M B"]:
    x, seq = streams.begin(model, batch.clean, batch.segment_ids)
    x, seq = streams.repeat(x, len(keep)), streams.widen(seq, len(keep))
    for l, block in enumerate(model.layers):
        keep_RN = np.tile(keep[:, l], (len(batch.at), 1))
        x = _masked(block, x, seq, keep_RN, means[l])
    x_RPD = streams.gather(x, np.repeat(batch.at, len(keep), axis=0))
    return _right(model, x_RPD, batch).reshape(len(batch.at), len(keep)).T


@jax.jit
def _masked(block: Block, x: Float[Array, "R T D"], seq: Seq, keep, mean) -> Array:
    _, o_RTNH = block.attn(block.attn_norm(x), seq)
    o_RTNH = jnp.where(keep[:, None, :, None], o_RTNH, mean.astype(x.dtype))
    y_RTD = jnp.einsum("rtnh,nhd->rtd", o_RTNH, block.attn.w_o[...].astype(x.dtype))
    if block.attn.b_o is not None:
        y_RTD = y_RTD + block.attn.b_o[...].astype(x.dtype)
    return block.after_attention(x + y_RTD)


@jax.jit
def _right(model: Model, x: Float[Array, "R P D"], batch: Batch) -> Float[Array, "R"]:
    many = x.shape[0] // batch.at.shape[0]
    answer, weight = (jnp.repeat(a, many, axis=0) for a in (batch.answer, batch.weight))
    hit_RP = (model.logits(model.norm(x)).argmax(-1) == answer) & (weight > 0)
    return hit_RP.sum(-1) / (weight > 0).sum(-1)
