"""Documents and recall prompts to rows of equal length, with segment ids, positions and loss mask.

A row is {"tokens", "segment_ids", "positions"} int32 [T] and "loss_mask" float32 [T]. Segments
count from 1, 0 is padding; positions restart in every segment; the mask is the weight of a token
*as a target*, so it is 0 where a segment starts: nothing before belongs to that document.
"""

import grain
import numpy as np
from grain import experimental

Row = dict[str, np.ndarray]
BINS = 64  # rows that best_fit fills at a time


class _Pieces(experimental.FlatMapTransform):
    """Cuts a document that is longer than a row, so that best_fit drops nothing."""

    max_fan_out = 1 << 31

    def __init__(self, seq_len: int):
        self._seq_len = seq_len

    def flat_map(self, element: Row) -> list[Row]:
        ids = element["tokens"]
        return [{"tokens": ids[i : i + self._seq_len]} for i in range(0, len(ids), self._seq_len)]


def pack(
    documents: grain.IterDataset, seq_len: int, packing: str, pad_id: int
) -> grain.IterDataset:
    """Turn documents ({"tokens": ids}) into rows.

    packing: "split" lets documents run on in the next row, so only the last row is padded;
        "best_fit" keeps every document that fits into a row whole.
    """
    if packing == "split":
        rows = experimental.ConcatThenSplitIterDataset(documents, length_struct={"tokens": seq_len})
    else:
        pieces = experimental.FlatMapIterDataset(documents, _Pieces(seq_len))
        rows = experimental.BestFitPackIterDataset(
            pieces, length_struct={"tokens": seq_len}, num_packing_bins=BINS, shuffle_bins=False
        )
    return rows.map(
        lambda row: finish(
            row["tokens"], row["tokens_segment_ids"], row["tokens_positions"], pad_id
        )
    )


def finish(tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray, pad_id: int) -> Row:
    """Name the arrays once and for all, and derive the loss mask."""
    return {
        "tokens": np.where(segment_ids > 0, tokens, pad_id).astype(np.int32),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": positions.astype(np.int32),
        "loss_mask": ((segment_ids > 0) & (positions > 0)).astype(np.float32),
    }


def single(tokens: np.ndarray, answers: np.ndarray | None, seq_len: int, pad_id: int) -> Row:
    """Make one prompt a row; `answers` limits the loss to them."""
    pad = (0, seq_len - len(tokens))
    inside = np.pad(np.ones(len(tokens), np.int32), pad)
    row = finish(np.pad(tokens, pad), inside, np.arange(seq_len) * inside, pad_id)
    return row if answers is None else row | {"loss_mask": row["loss_mask"] * np.pad(answers, pad)}


def empty(seq_len: int, pad_id: int) -> Row:
    """Make a row of padding alone."""
    return single(np.zeros(0, np.int32), None, seq_len, pad_id)
