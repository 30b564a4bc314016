"""Fusion: scores of several capabilities become one; every capability has the same weight.

    minmax   (s - min s) / (max s - min s), over all heads      (HydraHead, 2606.20097, Eq. 12)
    rank     share of the other heads that score less           (ties share the lowest place)

One structural head can raise the loss a hundred times more than all others; under min-max it
squeezes these to nothing, and the capability then speaks for that one head alone.
"""

import numpy as np

from hydrajax.typing import Float


def fuse(capabilities: list[Float[np.ndarray, "L N"]], norm: str) -> Float[np.ndarray, "L N"]:
    """Mean of the normalised scores, in [0, 1]."""
    normed = {"minmax": minmax, "rank": rank}[norm]
    return np.mean([normed(score) for score in capabilities], axis=0)


def minmax(score: Float[np.ndarray, "L N"]) -> Float[np.ndarray, "L N"]:
    """Scores moved and stretched to [0, 1]; constant scores become 0."""
    low, high = score.min(), score.max()
    return (score - low) / (high - low) if high > low else np.zeros_like(score)


def rank(score: Float[np.ndarray, "L N"]) -> Float[np.ndarray, "L N"]:
    """Share of the other heads that score less: 0 for the lowest, 1 for a single best one."""
    below = np.searchsorted(np.sort(score, axis=None), score, side="left")
    return below / max(score.size - 1, 1)
