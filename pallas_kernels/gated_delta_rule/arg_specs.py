"""Argument shapes and contents that every implementation of the gated delta rule is held to.

B batch   T tokens   K key heads   R value heads   H key dim   E value dim
"""

import dataclasses

import numpy as np

__all__ = ["SPECS", "GatedDeltaArgs"]


@dataclasses.dataclass(frozen=True)
class GatedDeltaArgs:
    """One call. `documents` are (segment id, length) in order; None draws gates at random."""

    shape: tuple[int, int, int, int, int, int] = (2, 100, 2, 2, 16, 24)  # B, T, K, R, H, E
    keys: str = "random"
    gate: tuple[float, ...] | None = None
    beta: tuple[float, ...] | None = None
    documents: tuple[tuple[int, int], ...] = ()
    initial_state: bool = False
    chunk: int = 64

    def arrays(self, rng: np.random.Generator) -> dict[str, np.ndarray | None]:
        """Draw float64 arguments; q and k have unit length."""
        B, T, K, R, H, E = self.shape
        q, k = _unit(rng.standard_normal((B, T, K, H))), self._draw_keys(rng)
        beta = rng.uniform(0, 1, (B, T, R))
        if self.beta is not None:
            beta = rng.choice(np.array(self.beta), (B, T, R))
        g = -rng.exponential(0.2, (B, T, R))
        if self.gate is not None:
            g = rng.choice(np.array(self.gate), (B, T, R))
        ids = [np.full(length, i) for i, length in self.documents]
        return {
            "q": q,
            "k": k,
            "v": rng.standard_normal((B, T, R, E)),
            "g": g,
            "beta": beta,
            "initial_state": rng.standard_normal((B, R, H, E)) if self.initial_state else None,
            "segment_ids": np.tile(np.concatenate(ids), (B, 1)).astype(np.int32) if ids else None,
        }

    def _draw_keys(self, rng):
        B, T, K, _, H, _ = self.shape
        own, shared = rng.standard_normal((B, T, K, H)), rng.standard_normal((B, 1, K, H))
        weight = {"random": 0.0, "correlated": 0.9, "repeated": 1.0}[self.keys]
        return _unit(weight**0.5 * shared + (1 - weight) ** 0.5 * own)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Borders inside chunks and on them (chunk 16), documents of one token, and an id that comes back.
_DOCUMENTS = ((1, 16), (2, 5), (1, 11), (3, 1), (4, 1), (2, 30), (0, 11))

SPECS = {
    "random": GatedDeltaArgs(),
    "one_token": GatedDeltaArgs(shape=(2, 1, 1, 2, 16, 16), initial_state=True),
    "grouped": GatedDeltaArgs(shape=(2, 96, 2, 6, 16, 8), chunk=32, initial_state=True),
    "correlated": GatedDeltaArgs(keys="correlated", beta=(0.98,), initial_state=True),
    # Powers of the triangular matrix reach 1e9 here: every series for its inverse fails.
    "repeated": GatedDeltaArgs(
        shape=(1, 128, 1, 2, 32, 32), keys="repeated", beta=(0.9, 0.98), gate=(0.0, -0.1)
    ),
    "no_decay": GatedDeltaArgs(gate=(0.0,), initial_state=True),
    # Some tokens keep their past, or the gradient of g would be nothing but rounding.
    "strong_decay": GatedDeltaArgs(gate=(-40.0, -0.1), initial_state=True),
    "beta_zero_or_one": GatedDeltaArgs(beta=(0.0, 1.0), chunk=16),
    "documents": GatedDeltaArgs(
        shape=(2, 75, 1, 2, 16, 16), documents=_DOCUMENTS, initial_state=True, chunk=16
    ),
    "long_document": GatedDeltaArgs(
        shape=(1, 75, 1, 1, 16, 16), documents=((5, 70), (6, 5)), initial_state=True, chunk=16
    ),
}
