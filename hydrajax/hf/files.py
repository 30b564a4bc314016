"""Reading a folder that nobody vouches for: paths, JSON and weight files, tensor by tensor.

transformers loads many broken folders without complaint; here every surprise is one error.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from hydrajax.hf.parity import read_pickle
from hydrajax.typing import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
WEIGHTS = "model.safetensors"
PICKLE = "pytorch_model.bin"


@dataclass(frozen=True)
class Entry:
    """A tensor that is not read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # numpy's name, or the file's own where numpy has none
    read: Callable[[], np.ndarray]


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def member(folder: Path, name: str) -> Path:
    """A file of the folder; refuses names and symlinks that lead out of it.

    The snapshots of a hub cache are symlinks into its `blobs`, the one place outside allowed.
    """
    if Path(name).name != name or "\\" in name or name in ("", ".."):
        raise UserError(f"{folder}: {name!r} is not a plain file name; refused.")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    home, real = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and real.parent != blobs:
        raise UserError(f"{path}: a symlink that leaves the folder (to {real}); refused.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}).") from e
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return values


def open_weights(folder: Path, *, allow_pickle: bool) -> dict[str, Entry]:
    """Every tensor of a folder, sharded or not; nothing is read but headers."""
    for name, opener in ((WEIGHTS, _open_safetensors), (PICKLE, _open_pickle)):
        index = folder / f"{name}.index.json"
        if not (folder / name).exists() and not index.exists():
            continue
        if name == PICKLE and not allow_pickle:
            raise UserError(
                f"{folder}: has {PICKLE} and no {WEIGHTS}; a pickle can run code. Convert it to "
                "safetensors, or pass --allow-pickle (reads it with torch's weights_only loader)."
            )
        if (folder / name).exists():
            return opener(member(folder, name))
        return _open_shards(folder, index.name, opener)
    suffixes = (".safetensors", ".bin", ".gguf")
    found = sorted(p.name for p in folder.iterdir() if p.suffix in suffixes)
    raise UserError(
        f"{folder}: no {WEIGHTS}, {WEIGHTS}.index.json or {PICKLE}; "
        f"weight files here: {', '.join(found) or 'none'}."
    )


def _open_shards(folder: Path, index_name: str, opener: Callable) -> dict[str, Entry]:
    index = member(folder, index_name)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map: expected an object of tensor names to files.")
    # All names are judged before the first file is opened.
    names = {str(name): None for name in weight_map.values()}
    shards = {name: member(folder, name) for name in names}
    entries: dict[str, Entry] = {}
    for name, path in shards.items():
        shard = opener(path)
        listed = {tensor for tensor, file in weight_map.items() if file == name}
        if lost := sorted(listed - shard.keys()):
            raise UserError(f"{index}: says {name} holds {some(lost)}; that file does not.")
        if extra := sorted(shard.keys() - listed):
            raise UserError(f"{path}: holds {some(extra)}; {index_name} does not say so.")
        entries |= shard
    return entries


def some(names: list[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _open_safetensors(path: Path) -> dict[str, Entry]:
    """Memory-mapped tensors. The library validates the header, lengths and offsets first."""
    try:
        with safe_open(path, "np"):
            pass
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        data = np.memmap(path, np.uint8, "r", offset=8 + size) if path.stat().st_size > 8 + size \
            else np.empty(0, np.uint8)  # fmt: skip
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a sound safetensors file ({e}).") from e
    header.pop("__metadata__", None)

    def entry(name: str) -> Entry:
        info = header[name]
        shape, dtype = tuple(info["shape"]), DTYPES.get(info["dtype"])
        start, end = info["data_offsets"]
        return Entry(
            path, shape, info["dtype"] if dtype is None else dtype.name,
            lambda: np.asarray(data[start:end]).view(dtype).reshape(shape),
        )  # fmt: skip

    return {name: entry(name) for name in header}


def _open_pickle(path: Path) -> dict[str, Entry]:
    return {
        name: Entry(path, array.shape, array.dtype.name, lambda array=array: array)
        for name, array in read_pickle(path).items()
    }
