"""Report: heads.json for the next stage, heads.png for the eye, a summary for the terminal."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from hydrajax.config import HydraConfig, ModelConfig, SelectConfig
from hydrajax.head_plan import FORMAT_VERSION, HeadPlan, cache_bytes, ratios
from hydrajax.manifest import write_atomic
from hydrajax.selection.fusion import PairEffects
from hydrajax.selection.scorers import Scores
from hydrajax.typing import Float

LENGTHS = {"4k": 4096, "128k": 131_072, "512k": 524_288}
TOP = 8  # heads named in the summary
PER_LINE = 8  # layers in a line of the summary


def heads_record(
    scores: Scores,
    plan: HeadPlan,
    model: ModelConfig,
    hydra: HydraConfig,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Content of heads.json; `head_plan.load_plan` reads its `plan`."""
    how = {"conv": hydra.la_short_conv != "off", "expanded_kv": hydra.fa_kv == "expanded"}
    full = HeadPlan.all_full(model.num_layers, model.num_heads, model.num_kv_heads)
    return {
        "format_version": FORMAT_VERSION,
        "plan": plan.to_json(),
        "scores": scores.score.tolist(),
        "raw_mean": scores.raw_mean.tolist(),
        "consistency": scores.consistency.tolist(),
        "capabilities": {name: part.tolist() for name, part in scores.parts.items()},
        "per_probe": {task: effect.tolist() for task, effect in scores.per_probe.items()},
        "ratios": ratios(plan, model.head_dim, **how),
        "cache_bytes": {
            name: {
                "teacher": cache_bytes(full, model.head_dim, tokens),
                "student": cache_bytes(plan, model.head_dim, tokens, **how),
            }
            for name, tokens in LENGTHS.items()
        },
        "provenance": provenance,
    }


def write(
    folder: Path, record: dict[str, Any], figure: Figure, effects: PairEffects | None = None
) -> None:
    """effects.npz and heads.png, then heads.json: who finds the last finds all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)  # a Figure without pyplot draws with Agg
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "heads.png", image.getvalue())
    if effects is not None:
        write_atomic(folder / "effects.npz", effects.to_bytes())
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomic(folder / "heads.json", text.encode())


def draw(scores: Scores, plan: HeadPlan, scorer: str) -> Figure:
    """Map of layers and heads: scores as colour, heads that stay full attention ringed."""
    layers, heads = scores.score.shape
    figure = Figure(figsize=(2.2 + 0.3 * heads, 1.4 + 0.24 * layers), layout="constrained")
    axes = figure.subplots()
    # Most scores are near zero: the square root keeps the small ones apart.
    top = max(float(scores.score.max()), 1e-6)
    norm = PowerNorm(0.5, 0.0, top)
    image = axes.imshow(scores.score, cmap="Blues", norm=norm, aspect="auto")
    chosen = [(n, l) for l, ids in enumerate(plan.fa) for n in ids]
    if chosen:
        ring = {"facecolors": "none", "edgecolors": "tab:orange", "linewidths": 1.4, "s": 60}
        axes.scatter(*zip(*chosen, strict=True), **ring)
    title = f"{scorer}: {plan.num_fa} of {scores.score.size} heads"
    axes.set(xlabel="query head", ylabel="layer", title=title)
    axes.set_xticks(range(0, heads, 1 + heads // 16))
    axes.set_yticks(range(0, layers, 1 + layers // 16))
    figure.colorbar(image, label="score" if scores.measured else "place in the order (control)")
    return figure


def summary(record: dict[str, Any], plan: HeadPlan, cfg: SelectConfig) -> str:
    """Readable account of a heads.json."""
    total, share = plan.num_layers * plan.num_heads, record["ratios"]
    cache = ", ".join(f"{v:.1%} at {name}" for name, v in share["cache_bytes"].items())
    lines = [
        f"{plan.num_fa} of {total} heads stay full attention "
        f"(scorer {cfg.scorer}, alloc {cfg.alloc}, unit {cfg.unit}, seed {cfg.seed})",
        *_layers(plan),
        f"FA query heads {share['fa_query_heads']:.1%} | kept KV heads "
        f"{share['kept_kv_heads']:.1%} | cache of the teacher's: {cache}",
    ]
    provenance = record["provenance"]
    for task, n in provenance["pairs"].items():
        rejected = f"{n['wrong']} answered wrongly, {n['small_gap']} with a small gap"
        lines.append(f"probe {task}: {n['accepted']} pairs, rejected: {rejected}")
    if provenance["tie_share"] is not None:
        lines += [
            f"ties: {provenance['tie_share']:.1%} of the budget scores below {cfg.ie_floor:g}; "
            "there the order is raw mean effect, attribution, rise of the loss, balance, the seed",
            f"top heads: {_top(np.array(record['scores']))}",
        ]
    return "\n".join(lines)


def _layers(plan: HeadPlan) -> Sequence[str]:
    """FA:LA of every layer, a few to a line."""
    cells = [f"{l:>2} {len(h):>2}:{plan.num_heads - len(h):<2}" for l, h in enumerate(plan.fa)]
    rows = [cells[i : i + PER_LINE] for i in range(0, len(cells), PER_LINE)]
    return ["FA:LA by layer  " + " | ".join(row) for row in rows]


def _top(score_LN: Float[np.ndarray, "L N"]) -> str:
    best = np.argsort(-score_LN, axis=None, kind="stable")[:TOP]
    cells = [np.unravel_index(i, score_LN.shape) for i in best]
    return ", ".join(f"L{l}H{n} {score_LN[l, n]:.3f}" for l, n in cells)
