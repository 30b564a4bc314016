"""Argument shapes and masks that every implementation of attention is held to.

B batch   T query tokens   S key tokens   N query heads   K key and value heads   H head dim
"""

import dataclasses

import numpy as np

__all__ = ["SPECS", "AttentionArgs"]


@dataclasses.dataclass(frozen=True)
class AttentionArgs:
    """One call. `documents` are (segment id, length) of the keys; `query_documents` make a pair.

    `q_offset` is a static int, or one int per row given as an array.
    """

    shape: tuple[int, int, int, int, int, int] = (2, 75, 75, 4, 4, 16)  # B, T, S, N, K, H
    causal: bool = True
    window: int | None = None
    q_offset: int | tuple[int, ...] = 0
    documents: tuple[tuple[int, int], ...] = ()
    query_documents: tuple[tuple[int, int], ...] = ()

    def arrays(self, rng: np.random.Generator) -> dict[str, np.ndarray | None]:
        """Draw float64 arguments and int32 ids."""
        B, T, S, N, K, H = self.shape
        return {
            "q": rng.standard_normal((B, T, N, H)),
            "k": rng.standard_normal((B, S, K, H)),
            "v": rng.standard_normal((B, S, K, H)),
            "q_ids": _ids(self.query_documents, B),
            "kv_ids": _ids(self.documents, B),
            "q_offset": np.array(self.q_offset, np.int32),
        }


def _ids(documents, rows):
    if not documents:
        return None
    ids = np.concatenate([np.full(length, i) for i, length in documents])
    return np.tile(ids, (rows, 1)).astype(np.int32)


_DOCUMENTS = ((1, 16), (2, 5), (1, 11), (3, 1), (2, 31), (0, 11))

SPECS = {
    "causal": AttentionArgs(),
    "grouped": AttentionArgs(shape=(2, 64, 64, 6, 2, 16)),
    "full": AttentionArgs(shape=(1, 40, 75, 2, 2, 16), causal=False),
    "window": AttentionArgs(window=20),
    "documents": AttentionArgs(shape=(2, 75, 75, 4, 2, 16), documents=_DOCUMENTS),
    "document_pair": AttentionArgs(
        shape=(1, 20, 75, 2, 1, 16),
        causal=False,
        documents=_DOCUMENTS,
        query_documents=((2, 8), (7, 4), (1, 8)),  # 7 is in no key: rows that see nothing
    ),
    "offset": AttentionArgs(shape=(2, 20, 75, 4, 2, 16), q_offset=50),
    "offset_by_row": AttentionArgs(shape=(2, 20, 75, 4, 2, 16), q_offset=(50, 3), window=30),
    "nothing_to_see": AttentionArgs(shape=(2, 20, 40, 2, 2, 16), q_offset=(-7, -30)),
}
