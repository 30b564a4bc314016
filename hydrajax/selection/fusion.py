"""Fusion: effects on pairs become a capability's score, and several capabilities one score.

    κ_n = share of probes whose mean effect of head n exceeds ie_floor
    s_n = clip(max over kinds of effect of its mean, 0, 1) · κ_n

Kinds are receiver and sender effects. Every capability has the same weight:

    minmax   (s - min s) / (max s - min s), over all heads      (HydraHead, 2606.20097, Eq. 11-12)
    rank     share of the other heads that score less           (ties share the lowest place)

One structural head can raise the loss a hundred times more than all others; under min-max it
squeezes these to nothing, and the capability then speaks for that one head alone.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hydrajax.typing import Float, Int


@dataclass(frozen=True)
class PairEffects:
    """Effects of every head on every pair: all that a capability's score is made of."""

    kinds: dict[str, Float[np.ndarray, "Q L N"]]
    probe: Int[np.ndarray, "Q"]  # index of the probe each pair belongs to

    @classmethod
    def load(cls, path: Path) -> "PairEffects":
        """effects.npz of a selection."""
        with np.load(path, allow_pickle=False) as arrays:
            kinds = {name: arrays[name] for name in arrays.files if name != "probe"}
            return cls(kinds, arrays["probe"])

    def to_bytes(self) -> bytes:
        """Content of effects.npz."""
        data = io.BytesIO()
        np.savez_compressed(data, probe=self.probe, **self.kinds)
        return data.getvalue()

    def take(self, pairs: np.ndarray) -> "PairEffects":
        """The same for some of the pairs, given as numbers or as a mask."""
        kinds = {name: effects[pairs] for name, effects in self.kinds.items()}
        return PairEffects(kinds, self.probe[pairs])

    def by_probe(self) -> Float[np.ndarray, "I L N"]:
        """Mean effect on each probe, the largest of the kinds."""
        means = [
            [effects[self.probe == i].mean(0) for i in np.unique(self.probe)]
            for effects in self.kinds.values()
        ]
        return np.max(means, axis=0)

    def raw_mean(self) -> Float[np.ndarray, "L N"]:
        """Mean over probes, signed, the largest of the kinds."""
        probes = np.unique(self.probe)
        means = [
            np.mean([effects[self.probe == i].mean(0) for i in probes], axis=0)
            for effects in self.kinds.values()
        ]
        return np.max(means, axis=0)

    def consistency(self, floor: float) -> Float[np.ndarray, "L N"]:
        """κ."""
        return (self.by_probe() > floor).mean(0)

    def score(self, floor: float) -> Float[np.ndarray, "L N"]:
        """s, in [0, 1]."""
        return np.clip(self.raw_mean(), 0, 1) * self.consistency(floor)


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
