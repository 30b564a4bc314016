"""Report: heads.json for the next stage, heads.png for the eye, a summary for the terminal."""

import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hydrajax.config import HydraConfig, ModelConfig, SelectConfig
from hydrajax.head_plan import FORMAT_VERSION, HeadPlan, cache_bytes, ratios
from hydrajax.manifest import write_atomic
from hydrajax.selection import figures
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


def write(folder: Path, record: dict[str, Any], scores: Scores, plan: HeadPlan) -> None:
    """effects.npz and heads.png, then heads.json: who finds the last finds all."""
    folder.mkdir(parents=True, exist_ok=True)
    label = "score" if scores.measured else "place in the order (control)"
    title = record["provenance"]["scorer"]
    write_atomic(folder / "heads.png", _png(figures.head_map(scores.score, plan, title, label)))
    if scores.effects is not None:
        write_atomic(folder / "effects.npz", scores.effects.to_bytes())
    write_atomic(folder / "heads.json", _json(record))


def write_report(folder: Path, diagnosis: dict[str, Any], told: str) -> None:
    """report.json, its figures, and index.html that shows them with the head map together."""
    named = figures.all_of(diagnosis)
    for name, figure in named.items():
        write_atomic(folder / name, _png(figure))
    write_atomic(folder / "report.json", _json(diagnosis))
    write_atomic(folder / "index.html", page(["heads.png", *named], told).encode())


def page(images: list[str], told: str) -> str:
    """One page: the summary as printed, then the images beside it."""
    shown = "\n".join(f'<p><img src="{name}" alt="{name}"></p>' for name in images)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Head selection</title>\n'
        f"<h1>Head selection</h1>\n<pre>{html.escape(told)}</pre>\n{shown}\n</html>\n"
    )


def _png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)  # a Figure without pyplot draws with Agg
    return image.getvalue()


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(finite(record), indent=1, allow_nan=False) + "\n").encode()


def finite(value: Any) -> Any:
    """JSON knows no NaN: a statistic that does not exist is null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


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
