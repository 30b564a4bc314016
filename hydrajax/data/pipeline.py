"""From a DataConfig to batches: shuffle, encode, pack, mix, batch, with an exact position.

Every process walks the same stream of rows and keeps its share of each batch, so the global
batch of a step does not depend on how many processes there are. Encoding is repeated on each
process; where that matters, encode the text once with `python -m hydrajax.data`.
"""

import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np
from absl import flags

from hydrajax.config import DataConfig, RunConfig, to_plain
from hydrajax.data import packing
from hydrajax.data.sources import Document, Documents, open_documents
from hydrajax.data.synthetic import check_task, training_row
from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import UserError

Batch = dict[str, np.ndarray]  # tokens, segment_ids, positions, loss_mask; each [B, T]
SPLITS = ("train", "holdout")
HOLDOUT_ROWS = 64  # of the loss at the end of a run and every eval_every steps
_HASHES = 1 << 32  # documents are assigned to a split by a 32 bit hash
_READ = grain.ReadOptions(num_threads=8, prefetch_buffer_size=32)


class Pipeline:
    """An endless iterator over the local rows of global batches; its position fits into JSON."""

    def __init__(self, rows: grain.IterDataset, stream: "Stream", share: slice):
        self._iterator = iter(rows.batch(stream.cfg.rows, drop_remainder=True))
        self.identity = stream.identity()
        self._share = share

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return {name: rows[self._share] for name, rows in next(self._iterator).items()}

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch, and what it is a position in."""
        state = {"identity": self.identity, "iterator": self._iterator.get_state()}
        return json.loads(json.dumps(state))  # a copy that no later batch changes

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called; refuses other data or settings."""
        then, now = state["identity"], self.identity
        changed = [f"{k} was {then.get(k)!r}, is {now[k]!r}" for k in now if then.get(k) != now[k]]
        if changed:
            raise UserError(
                "Cannot resume the data where the run stopped: "
                + "; ".join(changed)
                + ". Restore the old files and settings, or start a new run."
            )
        self._iterator.set_state(_from_json(state["iterator"]))

    def close(self) -> None:
        """Stop worker threads and processes."""
        self._iterator.close()


@dataclass(frozen=True)
class Stream:
    """Everything that decides which rows come, and in which order."""

    cfg: DataConfig
    tokenizer: Tokenizer
    split: str
    documents: Documents | None

    @property
    def pad_id(self) -> int:
        return max(self.tokenizer.pad_id, 0)  # any id will do: segment 0 marks padding

    def identity(self) -> dict[str, Any]:
        """Describe the stream, as stored in checkpoints."""
        fields = {f"data.{k}": v for k, v in to_plain(self.cfg).items() if k != "files"}
        content = self.documents.fingerprint if self.documents else ""
        return {
            "data.files (hash)": content,
            **fields,
            "split": self.split,
            "tokenizer (hash)": self.tokenizer.fingerprint,
        }

    def rows(self, epochs: int | None = None) -> grain.IterDataset:
        """Return the global rows; text ends after `epochs`, recall prompts never do."""
        share = self.cfg.synthetic_share if self.cfg.files else 1.0
        if share == 0:
            return self._text_rows(epochs)
        if share == 1:
            return self._recall_rows()
        return grain.IterDataset.mix(
            [self._text_rows(epochs), self._recall_rows()], [1 - share, share]
        )

    def _text_rows(self, epochs: int | None) -> grain.IterDataset:
        limit = _holdout_limit(self.documents, self.cfg)
        if self.split == "holdout" and limit == 0:
            raise UserError(
                "data.holdout: no document is held out; set data.holdout > 0 and give "
                "more than one document."
            )
        wanted = functools.partial(_is_wanted, limit=limit, holdout=self.split == "holdout")
        documents = (
            grain.MapDataset.source(self.documents)
            .shuffle(self.cfg.seed % _HASHES)
            .repeat(epochs)
            .filter(wanted)
            .map(functools.partial(_encode, tokenizer=self.tokenizer))
            # Dropped documents stay in as None, so workers cannot change the order.
            .to_iter_dataset(_READ, allow_nones=True)
        )
        if self.cfg.workers:
            if not flags.FLAGS.is_parsed():  # grain asks for its flags, also outside of absl.app
                flags.FLAGS.mark_as_parsed()
            documents = documents.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.cfg.workers)
            )
        documents = documents.filter(_is_some)
        return packing.pack(documents, self.cfg.seq_len, self.cfg.packing, self.pad_id)

    def _recall_rows(self) -> grain.IterDataset:
        return grain.MapDataset.range(sys.maxsize // 2).map(self._recall_row).to_iter_dataset(_READ)

    def _recall_row(self, index: int) -> packing.Row:
        cfg = self.cfg
        rng = np.random.default_rng([cfg.seed % _HASHES, SPLITS.index(self.split), int(index)])
        tokens, answers = training_row(cfg.synthetic, rng, cfg.seq_len, self.tokenizer)
        answers = answers if cfg.answer_only else None
        return packing.single(tokens, answers, cfg.seq_len, self.pad_id)


def _from_json(state: Any) -> Any:
    """Give grain's split points back as tuples: compared as lists, it goes astray silently."""
    if isinstance(state, dict):
        return {
            k: {f: tuple(v) for f, v in s.items()} if k == "remainder_slices" else _from_json(s)
            for k, s in state.items()
        }
    return [_from_json(s) for s in state] if isinstance(state, list) else state


def make_pipeline(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    *,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """Return the endless batches of a split; this process gets its contiguous share of rows."""
    stream = _open_stream(cfg, tokenizer, split)
    share = _share(cfg.rows, process_index, process_count)
    return Pipeline(stream.rows(), stream, share)


def eval_rows(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    rows: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    multiple: int = 1,
) -> list[Batch]:
    """Return the same first `rows` held-out rows each time, in batches of about `cfg.rows`.

    A batch has a multiple of `multiple` rows, which the devices of a mesh share; what is missing is
    padding. There are fewer rows where the text ends.
    """
    stream = _open_stream(cfg, tokenizer, "holdout")
    found = [row for row, _ in zip(stream.rows(epochs=1), range(rows), strict=False)]
    multiple = math.lcm(multiple, process_count)
    size = -(-min(cfg.rows, rows) // multiple) * multiple
    share = _share(size, process_index, process_count)
    found += [packing.empty(cfg.seq_len, stream.pad_id)] * (-len(found) % size)
    return [
        {k: np.stack([row[k] for row in found[i : i + size][share]]) for k in found[0]}
        for i in range(0, len(found), size)
    ]


def loss_rows(cfg: RunConfig, tokenizer: Tokenizer, **share: int) -> list[Batch]:
    """Return the held-out rows that a run is measured on, in micro-batches (`share`: `eval_rows`).

    None when the text keeps none back.
    """
    if cfg.data.files and not cfg.data.holdout:
        return []
    data = replace(cfg.data, rows=cfg.data.rows // cfg.train.accum)
    return eval_rows(data, tokenizer, HOLDOUT_ROWS, **share)


def _open_stream(cfg: DataConfig, tokenizer: Tokenizer, split: str) -> Stream:
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    if not cfg.files and not cfg.synthetic:
        raise UserError("data: give data.files or data.synthetic, both are empty.")
    if cfg.synthetic:
        check_task(cfg.synthetic)
    elif cfg.synthetic_share:
        raise UserError("data.synthetic_share > 0 needs data.synthetic, the name of a task.")
    documents = open_documents(cfg.files, cfg.text_key, tokenizer) if cfg.files else None
    return Stream(cfg, tokenizer, split, documents)


def _share(rows: int, process_index: int, process_count: int) -> slice:
    if rows % process_count:
        raise UserError(f"data.rows={rows} cannot be divided among {process_count} processes.")
    local = rows // process_count
    return slice(process_index * local, (process_index + 1) * local)


def _holdout_limit(documents: Documents, cfg: DataConfig) -> int:
    """Return the hash below which a document is held out; 0 if none is.

    Where hashes alone would leave a split empty, as with a handful of documents, it gets the
    document whose hash comes nearest; a single document trains.
    """
    limit = round(cfg.holdout * _HASHES)
    keys: set[int] = set()
    for i in range(len(documents)):
        content, key = documents[i]
        if len(content):
            keys.add(key)
            if min(keys) < limit <= max(keys) or limit == 0:
                return limit
    if not keys:
        raise UserError(f"data.files: all documents of {', '.join(cfg.files)} are empty.")
    if len(keys) == 1:
        return 0
    return min(keys) + 1 if min(keys) >= limit else max(keys)


def _is_wanted(document: Document, limit: int, holdout: bool) -> bool:
    return len(document.content) > 0 and (document.key < limit) == holdout


def _is_some(element: Any) -> bool:
    return element is not None


def _encode(document: Document, tokenizer: Tokenizer) -> packing.Row:
    """Return the ids of a document, closed by the end token if there is one."""
    ids = document.content
    ids = tokenizer.encode(ids) if isinstance(ids, str) else ids
    return {"tokens": np.concatenate([ids, tokenizer.eos_ids[:1]]).astype(np.int32)}
