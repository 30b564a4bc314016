"""Writing folders whole or not at all, and safetensors one tensor at a time."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hydrajax.hf.files import DTYPES, WEIGHTS
from hydrajax.typing import UserError

SHARD_BYTES = 5 * 10**9


@contextmanager
def new_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill beside `target`; takes its name if the block succeeds, else is removed.

    What stood at `target` before stays untouched until the new folder is complete on disk.
    """
    target = Path(os.path.abspath(target))
    _check(target, overwrite)
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        folder.chmod(0o755)  # mkdtemp makes it private
        yield folder
        _sync(folder)
        _swap(folder, target)
        _sync_path(target.parent)
    except OSError as e:
        reason = e.strerror or str(e)
        raise UserError(f"{target}: cannot be written ({reason}); nothing was changed.") from e
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UserError(f"{target}: exists already; choose another --out or pass --overwrite.")
    # Everything in the folder goes, so it must look like something one of our commands wrote.
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target}: is not a folder; --overwrite replaces folders only.")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise UserError(
            f"{target}: has no config.json, so it is no model folder; --overwrite spares it."
        )


def _swap(folder: Path, target: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / target.name)
    try:
        folder.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync_path(Path(root) / name)
        _sync_path(Path(root))


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Output:
    """A tensor to write; made when its turn comes, so that one is in memory at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_weights(folder: Path, outputs: list[Output], shard_bytes: int = SHARD_BYTES) -> list[str]:
    """model.safetensors, or shards of at most `shard_bytes` and their index; returns the names."""
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(o.nbytes for o in shards[-1]) + output.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(output)
    if len(shards) == 1:
        _write_safetensors(folder / WEIGHTS, shards[0])
        return [WEIGHTS]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard)
    where = {o.name: name for name, shard in zip(names, shards, strict=True) for o in shard}
    total = {"total_size": sum(o.nbytes for o in outputs)}
    index = {"metadata": total, "weight_map": dict(sorted(where.items()))}
    write_json(folder / f"{WEIGHTS}.index.json", index)
    return names


def _write_safetensors(path: Path, outputs: list[Output]) -> None:
    """The library's own writer wants all tensors of a file at once; this one streams.

    Order and padding are the library's (wide dtypes first, then by name), so equal tensors make
    equal files.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # The library breaks ties of width by the order F16, BF16.
    outputs = sorted(outputs, key=lambda o: (-o.dtype.itemsize, codes[o.dtype] == "F16", o.name))
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for o in outputs:
        start, end = end, end + o.nbytes
        span = [start, end]
        header[o.name] = {"dtype": codes[o.dtype], "shape": list(o.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for o in outputs:
            f.write(_bytes(o))
    path.chmod(0o644)


def _bytes(output: Output) -> memoryview:
    return np.ascontiguousarray(output.make(), dtype=output.dtype).reshape(-1).view(np.uint8).data
