"""Figures of a selection, each from the numbers in its JSON files alone."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from hydrajax.head_plan import HeadPlan
from hydrajax.typing import Float


def head_map(score: Float[np.ndarray, "L N"], plan: HeadPlan, title: str, label: str) -> Figure:
    """Map of layers and heads: scores as colour, heads that stay full attention ringed."""
    layers, heads = score.shape
    figure = Figure(figsize=(2.2 + 0.3 * heads, 1.4 + 0.24 * layers), layout="constrained")
    axes = figure.subplots()
    # Most scores are near zero: the square root keeps the small ones apart.
    norm = PowerNorm(0.5, 0.0, max(float(score.max()), 1e-6))
    image = axes.imshow(score, cmap="Blues", norm=norm, aspect="auto")
    chosen = [(n, l) for l, ids in enumerate(plan.fa) for n in ids]
    if chosen:
        ring = {"facecolors": "none", "edgecolors": "tab:orange", "linewidths": 1.4, "s": 60}
        axes.scatter(*zip(*chosen, strict=True), **ring)
    axes.set(xlabel="query head", ylabel="layer", title=f"{title}: {plan.num_fa} of {score.size}")
    axes.set_xticks(range(0, heads, 1 + heads // 16))
    axes.set_yticks(range(0, layers, 1 + layers // 16))
    figure.colorbar(image, label=label)
    return figure


def all_of(diagnosis: dict[str, Any]) -> dict[str, Figure]:
    """Figures of a report by file name."""
    return {
        "layers.png": layers(diagnosis),
        "knockout.png": knockout(diagnosis["knockout"], diagnosis["scorer"]),
        "stability.png": stability(diagnosis["stability"], diagnosis["top"]),
        "agreement.png": agreement(diagnosis["agreement"], diagnosis["top"]),
    }


def layers(diagnosis: dict[str, Any]) -> Figure:
    """Heads inside a layer differ, neighbouring layers do not: both, side by side."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ginis = np.array(diagnosis["gini"], float)
    left.bar(range(len(ginis)), np.nan_to_num(ginis))
    known = ginis[~np.isnan(ginis)]
    mean = f"mean {known.mean():.3f}" if len(known) else "no layer has a score"
    left.set(xlabel="layer", ylabel="Gini of head scores", ylim=(0, 1), title=mean)
    image = right.imshow(diagnosis["similarity"], vmin=0, vmax=1)
    right.set(xlabel="layer", ylabel="layer", title="cosine of layer outputs")
    figure.colorbar(image)
    return figure


def knockout(curve: dict[str, Any], scorer: str) -> Figure:
    """Recall against heads ablated, by score and at random."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    x = 100 * np.array(curve["counts"]) / curve["heads"]
    axes.fill_between(x, *curve["random_band"], alpha=0.3, color="gray", label="random, 95 %")
    axes.plot(x, curve["random_mean"], color="gray")
    axes.plot(x, curve["by_score"], marker="o", label=f"by {scorer}")
    low, high = curve["auc_random_band"]
    title = f"AUC {curve['auc_by_score']:.2f} by score, {low:.2f} to {high:.2f} at random"
    axes.set(xlabel="heads ablated, %", ylabel="answer tokens right", title=title)
    axes.legend()
    return figure


def stability(found: dict[str, Any], top: int) -> Figure:
    """How few pairs give the ranking of all of them."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    x = [row["pairs"] for row in found["pairs"]]
    for kind, label in (("spearman", "Spearman"), ("jaccard", f"top {top} Jaccard")):
        y = [np.nan if row[kind] is None else row[kind] for row in found["pairs"]]
        axes.plot(x, y, marker="o", label=label)
    axes.set(xlabel="pairs", ylabel="agreement with all pairs", ylim=(0, 1.02))
    axes.legend()
    return figure


def agreement(found: dict[str, Any], top: int) -> Figure:
    """Scorers against scorers."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    kinds = (("spearman", "Spearman"), ("jaccard", f"top {top} Jaccard"))
    for axes, (kind, title) in zip(figure.subplots(1, 2), kinds, strict=True):
        values = np.array(found[kind], float)
        axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
        _label(axes, found["scorers"], values)
        axes.set_title(title)
    return figure


def _label(axes: Axes, names: list[str], values: np.ndarray) -> None:
    axes.set_xticks(range(len(names)), names, rotation=30)
    axes.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour)
