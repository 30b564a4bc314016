"""Documents from files, by index: text, jsonl, parquet, ArrayRecord and `.tokens` folders.

A file is cut into documents by an index of byte offsets, built once; the bytes themselves stay
mapped (or, for compressed files, unpacked once in memory).
"""

import glob
import gzip
import hashlib
import itertools
import json
import lzma
import mmap
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hydrajax.data.synthetic import SAMPLE
from hydrajax.data.tokens import TokenFolder
from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import UserError

SEPARATOR = b"\x1e"
MAX_DOCUMENT = 4 << 20  # bytes; longer ones are read in pieces, cut after a line where possible
_LINE_SEARCH = 64 << 10  # how far back from such a cut a line end is looked for
_HASHED = 4 << 20  # bytes of a file that its fingerprint looks at
_SCAN = 16 << 20


class Document(NamedTuple):
    """A text, or ids that were made of one, and the hash that decides on train or holdout."""

    content: str | np.ndarray
    key: int


class Source(Protocol):
    """One file."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Document: ...


class Documents:
    """All documents of all files, in the order of the files; a grain random access source."""

    def __init__(self, sources: Sequence[Source], fingerprint: str):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(s) for s in sources))
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Document:
        at = bisect_right(self._ends, index)
        return self._sources[at][index - (self._ends[at - 1] if at else 0)]

    def __repr__(self) -> str:  # grain prints sources in errors
        return f"Documents({len(self._sources)} files, {len(self)} documents)"


def open_documents(files: Sequence[str], text_key: str, tokenizer: Tokenizer) -> Documents:
    """Open all files and globs; "sample" is the text that comes with the package."""
    paths = find_files(files)
    return Documents([_open(p, text_key, tokenizer) for p in paths], fingerprint(paths))


def find_files(files: Sequence[str]) -> list[Path]:
    """Expand globs, in order and without repeats."""
    paths: dict[Path, None] = {}
    for name in files:
        if name == "sample":
            found = [SAMPLE]
        elif glob.has_magic(name) and not Path(name).exists():
            found = [Path(p) for p in sorted(glob.glob(name, recursive=True))]
        else:
            found = [Path(name)] if Path(name).exists() else []
        if not found:
            raise UserError(f"data.files: {name!r} matches no file (working folder {Path.cwd()}).")
        paths |= dict.fromkeys(found)
    if not paths:
        raise UserError("data.files is empty; name text, .jsonl, .parquet, .array_record files.")
    return list(paths)


def fingerprint(paths: Sequence[Path]) -> str:
    """Hash names, sizes and contents: small files whole, large ones at 64 evenly spaced places."""
    total = hashlib.sha256()
    for path in paths:
        parts = sorted(path.iterdir()) if path.is_dir() else [path]
        for part in parts:
            size = part.stat().st_size
            total.update(f"{path.name}/{part.name} {size}\n".encode())
            block = _HASHED if size <= _HASHED else _HASHED // 64
            starts = [0] if size <= _HASHED else np.linspace(0, size - block, 64).astype(int)
            with part.open("rb") as f:
                for start in starts:
                    f.seek(int(start))
                    total.update(f.read(block))
    return total.hexdigest()


def _open(path: Path, text_key: str, tokenizer: Tokenizer) -> Source:
    if path.suffix == ".tokens":
        return TokenSource(TokenFolder(path, tokenizer))
    kind = Path(path.stem).suffix if path.suffix in (".xz", ".gz") else path.suffix
    if path.is_dir() or kind not in KINDS:
        raise UserError(
            f"{path}: unknown kind of data; known are {', '.join(KINDS)}, the first "
            "two also as .xz or .gz, and .tokens folders."
        )
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty.")
    source = KINDS[kind](path, text_key)
    if not len(source):
        raise UserError(f"{path}: no document in it, only separators.")
    return source


def _document(text: str) -> Document:
    return Document(text, zlib.crc32(text.encode("utf-8", "surrogatepass")))


class ByteSource:
    """A file of text, plain or compressed, and where its pieces start and end."""

    def __init__(self, path: Path):
        self.path = path
        self._check_utf8()
        self.spans = np.array(list(self._find_spans()), np.int64).reshape(-1, 2)

    @cached_property
    def data(self) -> bytes | mmap.mmap:
        if self.path.suffix in (".xz", ".gz"):
            unpack = lzma.open if self.path.suffix == ".xz" else gzip.open
            try:
                with unpack(self.path) as f:
                    return f.read()
            except (lzma.LZMAError, zlib.error, OSError, EOFError) as e:
                raise UserError(f"{self.path}: cannot be unpacked ({e}).") from e
        with self.path.open("rb") as f:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self):  # worker processes map the file themselves
        return {k: v for k, v in self.__dict__.items() if k != "data"}

    def __len__(self) -> int:
        return len(self.spans)

    def text(self, index: int) -> str:
        start, end = self.spans[index]
        return self.data[start:end].decode("utf-8")

    def _check_utf8(self) -> None:
        """Find a broken byte now and not after hours of training."""
        start, size = 0, len(self.data)
        while start < size:
            chunk = self.data[start : start + _SCAN]
            try:
                chunk.decode("utf-8")
                start += len(chunk)
            except UnicodeDecodeError as e:
                cut_off = e.reason == "unexpected end of data" and start + len(chunk) < size
                if not cut_off:
                    what = "of the unpacked text" if isinstance(self.data, bytes) else "of the file"
                    raise UserError(
                        f"{self.path}: not UTF-8 at byte {start + e.start} {what} "
                        f"({e.reason}); convert the file."
                    ) from e
                start += e.start  # a character runs over the border of two chunks


class TextSource(ByteSource):
    """Plain text; the byte 0x1e separates documents."""

    def __init__(self, path: Path, text_key: str):
        super().__init__(path)

    def __getitem__(self, index: int) -> Document:
        return _document(self.text(index))

    def _find_spans(self):
        start, size = 0, len(self.data)
        while start < size:
            end = self.data.find(SEPARATOR, start)
            end = size if end < 0 else end
            while end - start > MAX_DOCUMENT:
                cut = self._cut(start + MAX_DOCUMENT)
                yield start, cut
                start = cut
            if self.data[start:end].strip():
                yield start, end
            start = end + 1

    def _cut(self, at: int) -> int:
        """Return a place near `at` where a piece of a giant document may end."""
        line = self.data.rfind(b"\n", at - _LINE_SEARCH, at)
        if line >= 0:
            return line + 1
        while self.data[at] & 0xC0 == 0x80:  # inside a character
            at -= 1
        return at


class JsonlSource(ByteSource):
    """One JSON object a line; its text is under `text_key`."""

    def __init__(self, path: Path, text_key: str):
        super().__init__(path)
        self._key = text_key
        if len(self):
            self[0]  # a wrong text_key shows at once

    def __getitem__(self, index: int) -> Document:
        try:
            row = json.loads(self.text(index))
        except ValueError as e:
            raise UserError(f"{self._row(index)}: not valid JSON ({e}).") from e
        text = row.get(self._key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{self._row(index)}: expected a string under {self._key!r}, the row "
                f"has {has}; set data.text_key."
            )
        return _document(text)

    def _row(self, index: int) -> str:
        line = self.data[: self.spans[index][0]].count(b"\n") + 1
        return f"{self.path}, line {line}"

    def _find_spans(self):
        start, size = 0, len(self.data)
        while start < size:
            end = self.data.find(b"\n", start)
            end = size if end < 0 else end
            if self.data[start:end].strip():
                yield start, end
            start = end + 1


class ParquetSource:
    """A column of strings, held in memory as Arrow; make a .tokens folder of larger files."""

    def __init__(self, path: Path, text_key: str):
        self.path, self._key = path, text_key
        self._length = len(self.column)

    @cached_property
    def column(self):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as e:
            raise UserError(f"{self.path}: needs pyarrow: pip install 'hydrajax[parquet]'.") from e
        try:
            names = pq.read_schema(self.path).names
            table = pq.read_table(self.path, columns=[self._key]) if self._key in names else None
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{self.path}: not a readable parquet file ({e}).") from e
        if table is None:
            raise UserError(
                f"{self.path}: no column {self._key!r}, it has {names}; set data.text_key."
            )
        return table.column(0)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "column"}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document:
        text = self.column[index].as_py()
        if not isinstance(text, str):
            raise UserError(
                f"{self.path}, row {index}: expected a string under {self._key!r}, "
                f"got {text!r:.40}."
            )
        return _document(text)


class ArrayRecordSource:
    """Records of UTF-8 text."""

    def __init__(self, path: Path, text_key: str):
        try:
            from grain.sources import ArrayRecordDataSource
        except ImportError as e:
            raise UserError(
                f"{path}: needs array_record: pip install 'hydrajax[arrayrecord]'."
            ) from e
        self.path = path
        try:
            self._records = ArrayRecordDataSource(str(path))
        except (RuntimeError, ValueError, OSError) as e:
            raise UserError(f"{path}: not a readable ArrayRecord file ({e}).") from e

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        try:
            return _document(self._records[index].decode("utf-8"))
        except UnicodeDecodeError as e:
            raise UserError(f"{self.path}, record {index}: not UTF-8 at byte {e.start}.") from e


class TokenSource:
    """Documents that were encoded before (`python -m hydrajax.data`)."""

    def __init__(self, folder: TokenFolder):
        self._folder = folder

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> Document:
        return Document(self._folder[index], int(self._folder.keys[index]))


KINDS = {
    ".txt": TextSource,
    ".jsonl": JsonlSource,
    ".parquet": ParquetSource,
    ".array_record": ArrayRecordSource,
    ".arrayrecord": ArrayRecordSource,
}
