"""A `.tokens` folder: documents encoded once, read back without copying.

tokens.npy   uint16 or uint32 [tokens]     all documents, one after the other, no end tokens
offsets.npy  int64 [documents + 1]         where each one starts
keys.npy     uint32 [documents]            hashes of the texts: the same holdout as the texts
meta.json    format version, hash of tokenizer.json, counts
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import UserError

FORMAT_VERSION = 1
_BATCH = 8 << 20  # characters encoded at a time: enough for all cores, little memory


class TokenFolder:
    """Reads such a folder; refuses one that another tokenizer made."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.path = path
        try:
            meta = json.loads((path / "meta.json").read_text("utf-8"))
            version, made_with = meta["format_version"], meta["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path}: not a .tokens folder ({e!r}); make one with python -m hydrajax.data."
            ) from e
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}/meta.json: format_version {version}, expected "
                f"{FORMAT_VERSION}; make the folder again."
            )
        if made_with != tokenizer.fingerprint:
            raise UserError(
                f"{path}: made with another tokenizer (tokenizer.json sha256 "
                f"{made_with[:12]}, here {tokenizer.fingerprint[:12]}); encode the "
                "texts again with python -m hydrajax.data."
            )
        counts = (len(self.tokens), len(self.offsets) - 1, len(self.keys))
        if counts != (meta["tokens"], meta["documents"], meta["documents"]):
            raise UserError(
                f"{path}: damaged, {counts[0]} tokens in {counts[1]} documents, "
                f"meta.json says {meta['tokens']} in {meta['documents']}."
            )

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._load("tokens")

    @cached_property
    def offsets(self) -> np.ndarray:
        return self._load("offsets")

    @cached_property
    def keys(self) -> np.ndarray:
        return self._load("keys")

    def _load(self, name: str) -> np.ndarray:
        try:
            return np.load(self.path / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError) as e:
            raise UserError(f"{self.path}/{name}.npy: cannot be read ({e}).") from e

    def __getstate__(self):  # worker processes map the files themselves
        return {"path": self.path}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def tokenize_documents(documents: Iterable, tokenizer: Tokenizer, out: Path) -> dict[str, int]:
    """Encode `Document`s on all cores into a new folder; return its counts."""
    out = Path(out)
    if out.suffix != ".tokens" or out.exists():
        raise UserError(f"{out}: must end in .tokens and not exist yet.")
    part = out.with_name(f"{out.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    keys, sizes = [], []
    try:
        with (part / "tokens.npy").open("w+b") as f:
            _write_header(f, dtype, 0)
            for batch in _batches(documents):
                for ids in tokenizer.encode_batch([d.content for d in batch]):
                    f.write(np.array(ids, dtype).tobytes())
                    sizes.append(len(ids))
                keys += [d.key for d in batch]
            _write_header(f, dtype, sum(sizes))
        np.save(part / "offsets.npy", np.cumsum([0, *sizes], dtype=np.int64))
        np.save(part / "keys.npy", np.array(keys, np.uint32))
        counts = {"documents": len(sizes), "tokens": sum(sizes)}
        meta = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer.fingerprint, **counts}
        (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        part.rename(out)
    except BaseException:
        shutil.rmtree(part)
        raise
    return counts


def _write_header(f, dtype: np.dtype, count: int) -> None:
    """Write the .npy header; numpy pads it so that a later count fits in its place."""
    f.seek(0)
    np.lib.format.write_array_header_1_0(
        f, {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    )


def _batches(documents: Iterable) -> Iterator[list]:
    batch, size = [], 0
    for document in documents:
        if not isinstance(document.content, str):
            raise UserError("A .tokens folder holds no text; encode the files it was made from.")
        batch.append(document)
        size += len(document.content)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
