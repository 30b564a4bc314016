"""Statistics of head scores: how unequal heads are, and how much two rankings agree."""

import numpy as np

from hydrajax.selection.fusion import rank
from hydrajax.typing import Float


def gini(values: Float[np.ndarray, "N"]) -> float:
    """Gini coefficient of values >= 0: 0 all equal, near 1 one has all; NaN if all are 0."""
    ordered = np.sort(np.asarray(values, np.float64))
    total, size = ordered.sum(), len(ordered)
    if total <= 0:
        return float("nan")
    return float((2 * np.arange(1, size + 1) - size - 1) @ ordered / (size * total))


def layer_ginis(score: Float[np.ndarray, "L N"]) -> list[float]:
    """Gini of the heads of each layer."""
    return [gini(row) for row in score]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank, a constant side gives NaN."""
    ranks = [_mean_ranks(np.ravel(x)) for x in (a, b)]
    if any(r.std() == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def top_jaccard(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Heads common to both top-k sets, over those in either."""
    one, two = (set(np.argsort(-np.ravel(x), kind="stable")[:k].tolist()) for x in (a, b))
    return len(one & two) / len(one | two)


def _mean_ranks(x: np.ndarray) -> np.ndarray:
    return (rank(x) - rank(-x)) / 2
