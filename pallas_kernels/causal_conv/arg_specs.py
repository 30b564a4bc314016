"""Argument shapes that every implementation of the causal convolution is held to.

B batch   T tokens   W taps   C channels
"""

import dataclasses

import numpy as np

__all__ = ["SPECS", "CausalConvArgs"]


@dataclasses.dataclass(frozen=True)
class CausalConvArgs:
    """One call. `documents` are (segment id, length) in order."""

    shape: tuple[int, int, int, int] = (2, 37, 4, 12)  # B, T, W, C
    activation: str | None = None
    documents: tuple[tuple[int, int], ...] = ()
    initial_state: bool = False

    def arrays(self, rng: np.random.Generator) -> dict[str, np.ndarray | None]:
        """Draw float64 arguments and int32 ids."""
        B, T, W, C = self.shape
        ids = [np.full(length, i) for i, length in self.documents]
        return {
            "x": rng.standard_normal((B, T, C)),
            "w": rng.standard_normal((W, C)),
            "initial_state": rng.standard_normal((B, W - 1, C)) if self.initial_state else None,
            "segment_ids": np.tile(np.concatenate(ids), (B, 1)).astype(np.int32) if ids else None,
        }


_DOCUMENTS = ((1, 2), (2, 1), (1, 14), (3, 18), (4, 2))

SPECS = {
    "plain": CausalConvArgs(),
    "silu": CausalConvArgs(activation="silu", initial_state=True),
    "documents": CausalConvArgs(activation="silu", documents=_DOCUMENTS, initial_state=True),
    "one_token": CausalConvArgs(shape=(2, 1, 4, 12), initial_state=True),
    "one_tap": CausalConvArgs(shape=(2, 9, 1, 12)),
}
