"""A teacher's k best words for the rows of a stream, on disk: written once, read by `data.taught`.

train-000000000.npy    records of the rows from 0 on; the next file is named after its first row
holdout-000000000.npy  the held-out rows that runs are measured on
manifest.json          what the rows are, who spoke, and the files; renewed after each of them

A record: `key` (hash of the row's tokens, segments and positions), `check` (CRC-32 of the rest),
`ids` uint16 or int32 [T, k], `log_p` float32 [T, k] at temperature 1, and `rest` float32
[T, temperatures] (see `losses.best_words`). A file that is not in the manifest does not count, and
one that is lost leaves a gap, which the next command fills. One command writes at a time: it holds
a lock on `.lock`, which the system lets go when it ends, however it ends.
"""

import fcntl
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hydrajax.data.pipeline import Batch
from hydrajax.manifest import write_atomic
from hydrajax.typing import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
SHARD_BYTES = 256 << 20  # what a killed command has to compute again, at most
PAYLOAD = ("ids", "log_p", "rest")
MAKE = "make it with python -m hydrajax.teacher_cache and the same config"


@dataclass(frozen=True)
class Header:
    """What a cache holds: all that decides the rows, their order and what is said of them."""

    identity: dict[str, Any]  # of the data and of the teacher
    top_k: int
    vocab_size: int
    temperatures: tuple[float, ...]

    @property
    def record(self) -> np.dtype:
        """One row on disk."""
        tokens = self.identity["data.seq_len"]
        ids = "<u2" if self.vocab_size <= 1 << 16 else "<i4"
        return np.dtype([
            ("key", "<u8"), ("check", "<u4"), ("ids", ids, (tokens, self.top_k)),
            ("log_p", "<f4", (tokens, self.top_k)),
            ("rest", "<f4", (tokens, len(self.temperatures))),
        ])  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """What the records of a run say of the cache that taught it; JSON."""
        text = json.dumps(self.identity, sort_keys=True)
        return {
            "top_k": self.top_k,
            "teacher (hash)": self.identity["teacher (hash)"],
            "identity (hash)": hashlib.sha256(text.encode()).hexdigest(),
        }

    def refuse_unless(self, where: Path, expected: dict[str, Any]) -> None:
        """UserError that names what differs from the identity expected."""
        wrong = [
            f"{name}: expected {value!r}, got {self.identity.get(name)!r}"
            for name, value in expected.items()
            if self.identity.get(name) != value
        ]
        if wrong:
            raise UserError(f"{where} is a teacher cache of something else: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class Shard:
    """One file: the rows of a split from `first` on."""

    split: str
    first: int
    rows: int
    size: int  # bytes

    @property
    def name(self) -> str:
        return f"{self.split}-{self.first:09d}.npy"


class Cache:
    """Reads such a folder; UserError if it is none, or if a file is missing or cut."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.header, self.shards, self.made_by = _read_manifest(self.path)
        self._open: tuple[Shard, np.ndarray] | None = None
        for shard in self.shards:
            file = self.path / shard.name
            size = file.stat().st_size if file.is_file() else 0
            if size != shard.size:
                raise UserError(f"{file} has {size} bytes, expected {shard.size}; {MAKE}.")

    def rows(self, split: str) -> int:
        """Rows of a split from the first on, up to the first that is missing."""
        return _gap(self.shards, split)[0]

    def keys(self, split: str) -> Iterator[tuple[int, int]]:
        """(row, key) of all rows in order."""
        for shard in self.shards:
            if shard.split == split:
                yield from enumerate(map(int, self._map(shard)["key"]), shard.first)

    def words(self, split: str, at: list[int | None], batch: Batch, temperature: float) -> Batch:
        """What `losses.cached_kl` reads, for the rows of a batch, which are rows `at` of the cache.

        None is a row of padding, of which nothing is said. UserError if a row has other tokens, or
        its record does not match its checksum.
        """
        out = np.zeros(len(at), self.header.record)
        for i, row in enumerate(at):
            if row is not None:
                out[i] = self._record(split, row, row_key(batch, i))
        column = self.header.temperatures.index(temperature)
        return {
            "teacher_ids": np.ascontiguousarray(out["ids"]),
            "teacher_log_p": np.ascontiguousarray(out["log_p"]),
            "teacher_rest": np.ascontiguousarray(out["rest"][..., column]),
        }

    def _record(self, split: str, row: int, key: int) -> np.void:
        shard = next(
            (s for s in self.shards if s.split == split and 0 <= row - s.first < s.rows), None
        )
        if shard is None:
            raise UserError(f"{self.path} holds {self.rows(split)} {split} rows, not row {row}.")
        record = self._map(shard)[row - shard.first]
        if record["key"] != key:
            raise UserError(
                f"{self.path}: {split} row {row} has other tokens than when the cache was made, "
                f"although its config is the same. Remove the folder and {MAKE}."
            )
        if record["check"] != _checksum(record):
            file = self.path / shard.name
            raise UserError(f"{file}: row {row} is damaged. Remove this file and {MAKE}.")
        return record

    def _map(self, shard: Shard) -> np.ndarray:
        if self._open is None or self._open[0] != shard:
            self._open = shard, _map(self.path, shard, self.header.record)
        return self._open[1]


def fields(path: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What a cache adds to a batch, nothing if "": name -> (axes after rows and tokens, dtype)."""
    if not path:
        return {}
    header, _, _ = _read_manifest(Path(path))
    k, ids = (header.top_k,), header.record["ids"].base
    f4 = np.dtype(np.float32)
    return {"teacher_ids": (k, ids), "teacher_log_p": (k, f4), "teacher_rest": ((), f4)}


class Writer:
    """Makes such a folder, or goes on where a killed one stopped; whole files are kept.

    A context: other commands are refused until it is left.
    """

    def __init__(self, path: str | Path, header: Header, made_by: dict[str, Any]):
        self.path, self.header, self.made_by = Path(path), header, made_by
        self.shards: list[Shard] = []
        self.lost: list[Shard] = []  # of the manifest found: missing or cut
        self._pending: list[np.ndarray] = []
        cut = f".{MANIFEST}."  # how what was being written begins, when a command was killed
        others = [f for f in self.path.glob("*") if f.name != LOCK and not f.name.startswith(cut)]
        if others and not self._begun():
            raise UserError(f"{self.path} holds other files; name a new folder.")
        self._lock = _lock(self.path)
        try:
            for file in self.path.glob(f"{cut}*"):
                file.unlink()
            if self._begun():
                self._go_on()
            self._commit()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    def rows(self, split: str, end: int = sys.maxsize) -> int:
        """Rows of a split before `end` that are on disk."""
        ours = [shard for shard in self.shards if shard.split == split]
        return sum(max(0, min(s.rows, end - s.first)) for s in ours)

    def add(self, split: str, batch: Batch, words: tuple[np.ndarray, ...]) -> None:
        """Take the first rows that are missing, in order; written when they make a file."""
        records = np.zeros(len(batch["tokens"]), self.header.record)
        for name, values in zip(PAYLOAD, words, strict=True):
            records[name] = values
        for i, record in enumerate(records):
            record["key"], record["check"] = row_key(batch, i), _checksum(record)
        while len(records):
            first, end = _gap(self.shards, split)
            room = end - first - sum(map(len, self._pending))
            self._pending.append(records[:room])
            if len(records) >= room or sum(r.nbytes for r in self._pending) >= SHARD_BYTES:
                self.flush(split)
            records = records[room:]

    def flush(self, split: str) -> None:
        """Write what was added since."""
        if not self._pending:
            return
        file, records = io.BytesIO(), np.concatenate(self._pending)
        np.save(file, records)
        shard = Shard(split, _gap(self.shards, split)[0], len(records), file.tell())
        self._put(shard.name, file.getvalue())
        self.shards = sorted([*self.shards, shard], key=lambda s: (s.split, s.first))
        self._commit()
        self._pending = []

    def _go_on(self) -> None:
        found, shards, _ = _read_manifest(self.path)
        found.refuse_unless(self.path, self.header.identity)
        for name in ("top_k", "vocab_size", "temperatures"):
            here, there = getattr(self.header, name), getattr(found, name)
            if here != there:
                raise UserError(
                    f"{self.path} was begun with {name}={there}, expected {here}; name a new "
                    "folder or remove this one."
                )
        for shard in shards:
            file = self.path / shard.name
            whole = file.is_file() and file.stat().st_size == shard.size
            (self.shards if whole else self.lost).append(shard)
        kept = {shard.name for shard in self.shards}
        for split in ("train", "holdout"):
            for file in (*self.path.glob(f"{split}-*.npy"), *self.path.glob(f".{split}-*.npy.*")):
                if file.name not in kept:
                    file.unlink()

    def _begun(self) -> bool:
        return (self.path / MANIFEST).is_file()

    def _commit(self) -> None:
        body = {
            "format_version": FORMAT_VERSION,
            "header": asdict(self.header),
            "made_by": self.made_by,
            "shards": [asdict(shard) for shard in self.shards],
        }
        self._put(MANIFEST, (json.dumps(body, indent=1) + "\n").encode())

    def _put(self, name: str, data: bytes) -> None:
        try:
            write_atomic(self.path / name, data)
        except OSError as e:
            raise UserError(f"{self.path / name} cannot be written ({e.strerror}).") from e


def row_key(batch: Batch, i: int) -> int:
    """64 bits of a hash of all that a model reads of row i."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ("tokens", "segment_ids", "positions"):
        digest.update(np.ascontiguousarray(batch[name][i], "<i4"))
    return int.from_bytes(digest.digest(), "little")


def _checksum(record: np.void) -> int:
    check = 0
    for name in PAYLOAD:
        check = zlib.crc32(np.ascontiguousarray(record[name]), check)
    return check


def _gap(shards: list[Shard], split: str) -> tuple[int, int]:
    """The first row that no file has, and the next one that some file has; files in order."""
    end = 0
    for shard in shards:
        if shard.split == split:
            if shard.first > end:
                return end, shard.first
            end = shard.first + shard.rows
    return end, sys.maxsize


def _lock(folder: Path) -> io.BufferedWriter:
    """Hold the folder until the file that is returned is closed.

    It stays: who removes a lock may remove that of another who took it meanwhile.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}).") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise UserError(
            f"{folder} is being written by another command, which holds {path}; wait for its end, "
            "or name another folder."
        ) from e
    except OSError as e:
        file.close()
        raise UserError(f"{path} cannot be locked ({e.strerror}); take another disk.") from e
    return file


def _map(folder: Path, shard: Shard, record: np.dtype) -> np.ndarray:
    file = folder / shard.name
    try:
        found = np.load(file, mmap_mode="r")
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read ({e}). Remove it and {MAKE}.") from e
    if found.dtype != record or found.shape != (shard.rows,):
        raise UserError(f"{file} holds other records than its manifest says; {MAKE}.")
    return found


def _read_manifest(folder: Path) -> tuple[Header, list[Shard], dict[str, Any]]:
    file = folder / MANIFEST
    try:
        body = json.loads(file.read_text("utf-8"))
        version = body["format_version"]
        if version == FORMAT_VERSION:
            header = dict(body["header"])
            temperatures = tuple(header.pop("temperatures"))
            shards = [Shard(**values) for values in body["shards"]]
            return Header(temperatures=temperatures, **header), shards, body["made_by"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} is not a teacher cache ({e!r}); {MAKE}.") from e
    raise UserError(f"{file}: format_version {version}, expected {FORMAT_VERSION}; {MAKE}.")
