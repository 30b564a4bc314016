"""Diagnosis: what there is to say of scores beyond the choice they lead to.

gini         inequality of heads inside each layer (HydraHead: 0.622 in the mean)
similarity   cosine of the residual after layer i and layer j: layers give no natural cut
knockout     recall as heads are ablated by score, against random orders
stability    rank correlation and top-K overlap over pairs, split halves and context lengths
agreement    the same between scorers
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.config import SelectConfig
from hydrajax.model import Model
from hydrajax.selection import budget, knockout, streams
from hydrajax.selection.fusion import PairEffects
from hydrajax.selection.probes import Batch, batches
from hydrajax.selection.scorers import SCORERS, Context, Scores
from hydrajax.selection.statistics import layer_ginis, spearman, top_jaccard
from hydrajax.selection.work import Work
from hydrajax.typing import Float, UserError

RIVALS = ("patch_recv", "atp", "retrieval", "ppl")  # scorers cheap enough to be asked as well
PAIR_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24)
DRAWS = 20  # random subsets of pairs of each size
KNOCKOUT_PAIRS = 3  # of each probe
SHORTER = (2, 4)  # parts of the context at which stability is asked for
EVERY = 16  # tokens between those whose residuals are compared


def diagnose(context: Context, scores: Scores) -> dict[str, Any]:
    """All of the above for scores that were measured on pairs; JSON-ready."""
    score, cfg = scores.effects.score(context.cfg.ie_floor), context.cfg
    top = budget.round_half_up(cfg.ratio * score.size)
    parts = batches([p for probe in context.probes for p in probe.pairs], cfg)
    curve = knockout.measure(context, score, KNOCKOUT_PAIRS)
    return {
        "scorer": cfg.scorer,
        "top": top,
        "gini": layer_ginis(score),
        "share_above_floor": float((score > cfg.ie_floor).mean()),
        "similarity": layer_similarity(context.model, parts[0][0]).tolist(),
        "knockout": curve.to_json(),
        "stability": {
            "pairs": over_pairs(scores.effects, cfg, top),
            "halves": split_halves(scores.effects, cfg, top),
            "contexts": over_contexts(context, top),
        },
        "agreement": agreement(context, {cfg.scorer: score}, top),
    }


def compare(a: np.ndarray, b: np.ndarray, top: int) -> dict[str, float | None]:
    """Rank correlation over all heads and overlap of the best ones."""
    rho = spearman(a, b)
    return {"spearman": None if np.isnan(rho) else rho, "jaccard": top_jaccard(a, b, top)}


def over_pairs(effects: PairEffects, cfg: SelectConfig, top: int) -> list[dict[str, Any]]:
    """Scores from a few pairs against those from all: mean of random subsets of each size."""
    rng, full, out = np.random.default_rng(cfg.seed), effects.score(cfg.ie_floor), []
    total = len(effects.probe)
    for count in [c for c in PAIR_COUNTS if c < total]:
        found = []
        for _ in range(DRAWS):
            few = effects.take(rng.permutation(total)[:count]).score(cfg.ie_floor)
            found.append((spearman(few, full), top_jaccard(few, full, top)))
        rho, jaccard = np.array(found).T
        known = rho[~np.isnan(rho)]
        out.append({
            "pairs": count,
            "spearman": float(known.mean()) if len(known) else None,
            "jaccard": float(jaccard.mean()),
        })  # fmt: skip
    return out


def split_halves(effects: PairEffects, cfg: SelectConfig, top: int) -> dict[str, float | None]:
    """Every other pair against the rest: no pair is in both."""
    even = np.arange(len(effects.probe)) % 2 == 0
    halves = [effects.take(part).score(cfg.ie_floor) for part in (even, ~even)]
    return compare(*halves, top)


def over_contexts(context: Context, top: int) -> list[dict[str, Any]]:
    """Receiver scores at shorter contexts against those at the whole one."""
    whole, found = SCORERS["patch_recv"](context).score, []
    for part in SHORTER:
        tokens = context.cfg.context // part
        folder = context.work.folder and context.work.folder / f"context_{tokens}"
        shorter = replace(
            context,
            cfg=replace(context.cfg, context=tokens),
            load_model=lambda: context.model,
            work=Work(folder, context.work.identity),
        )
        try:
            score = SCORERS["patch_recv"](shorter).score
        except UserError as error:  # a needle may no longer fit: that is told, not the end of it
            found.append({"tokens": tokens, "left_out": str(error)})
            continue
        found.append({"tokens": tokens, **compare(score, whole, top)})
    return found


def agreement(context: Context, scores: dict[str, np.ndarray], top: int) -> dict[str, Any]:
    """Rank correlation and overlap between the scorer and its rivals, as two matrices."""
    for name in RIVALS:
        if name not in scores and (name != "ppl" or context.cfg.general == "ppl"):
            scores[name] = SCORERS[name](context).score
    table = [[compare(a, b, top) for b in scores.values()] for a in scores.values()]
    return {
        "scorers": list(scores),
        **{kind: [[cell[kind] for cell in row] for row in table] for kind in table[0][0]},
    }


def layer_similarity(model: Model, batch: Batch) -> Float[np.ndarray, "L L"]:
    """Mean cosine between the residuals after two layers, over tokens of a batch."""
    x, seq = streams.begin(model, batch.clean, batch.segment_ids)
    places = np.arange(0, batch.clean.shape[1], EVERY)
    at = np.broadcast_to(places, (len(batch.clean), len(places)))
    seen = []
    for block in model.layers:
        x = streams.plain(block, x, seq)
        seen.append(streams.gather(x, at))
    real = np.take_along_axis(batch.segment_ids, at, axis=1) > 0
    return jax.device_get(_cosines(jnp.stack(seen), jnp.asarray(real)))


@jax.jit
def _cosines(x: Float[jax.Array, "L B P D"], real) -> Float[jax.Array, "L L"]:
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return jnp.einsum("ibpd,jbpd,bp->ij", unit, unit, real.astype(x.dtype)) / real.sum()
