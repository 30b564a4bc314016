"""Rows that come with their teacher's best words: a stream's and held-out ones."""

from collections.abc import Iterator
from typing import Any

from hydrajax.data.pipeline import Batch, Pipeline
from hydrajax.data.top_k import MAKE, Cache, row_key
from hydrajax.typing import UserError


class Taught:
    """A pipeline whose batches also hold the teacher's best words; its position too is JSON."""

    def __init__(
        self, pipeline: Pipeline, cache: Cache, temperature: float, *,
        process_index: int = 0, process_count: int = 1,
    ):  # fmt: skip
        self._pipeline, self._cache, self._temperature = pipeline, cache, temperature
        self._process, self._of = process_index, process_count
        self._row = 0  # of the stream, the first of the next global batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._pipeline)
        local = len(batch["tokens"])
        first = self._row + self._process * local
        at = list(range(first, first + local))
        words = self._cache.words("train", at, batch, self._temperature)
        self._row += self._of * local
        return batch | words

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch, and what the cache is."""
        own = {"teacher_row": self._row, "teacher_cache": self._cache.header.summary()}
        return self._pipeline.get_state() | own

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called; UserError if the cache is another one by now."""
        now = self._cache.header.summary()
        then = state.get("teacher_cache", {})  # of older states nothing is known
        wrong = [f"{k}: expected {then[k]!r}, got {now.get(k)!r}" for k in then
                 if then[k] != now.get(k)]  # fmt: skip
        if wrong:
            raise UserError(
                f"{self._cache.path} is not the teacher cache that the run began with: "
                f"{'; '.join(wrong)}. Make that one again, or set config.out to a new folder."
            )
        self._pipeline.set_state(state)
        self._row = state["teacher_row"]

    def close(self) -> None:
        self._pipeline.close()


def taught_rows(cache: Cache, batches: list[Batch], temperature: float) -> list[Batch]:
    """Held-out batches with the teacher's best words, found by the rows' keys."""
    row_of = {key: row for row, key in cache.keys("holdout")}

    def find(batch: Batch, i: int) -> int | None:
        if not batch["segment_ids"][i].any():
            return None
        row = row_of.get(row_key(batch, i))
        if row is None:
            raise UserError(
                f"{cache.path} lacks a held-out row: expected it among {len(row_of)}. Its command "
                f"may have been cut; {MAKE}."
            )
        return row

    out = []
    for batch in batches:
        at = [find(batch, i) for i in range(len(batch["tokens"]))]
        out.append(batch | cache.words("holdout", at, batch, temperature))
    return out
