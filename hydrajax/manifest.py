"""What makes a checkpoint step whole: a manifest of every file's sha256, written last.

Orbax restores flipped bits, cast dtypes and empty folders without a word, so trust comes from
here: a step counts only when its `manifest.json` is present, intact and true of the files.
"""

import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrajax.array_tree import HASH_THREADS, Arrays
from hydrajax.typing import UserError

FORMAT_VERSION = 1
NAME = "manifest.json"


class Damaged(Exception):
    """Why a step cannot be trusted, with the name of the file that shows it."""


@dataclass(frozen=True)
class Manifest:
    """Contents of one step: files with their hashes, and the arrays they hold by tree."""

    step: int
    files: dict[str, dict[str, Any]]  # relative path -> {"sha256", "size"}
    arrays: dict[str, Arrays]  # "params", "opt_state"
    meta: dict[str, Any]


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path` entirely or not at all, also through a power cut."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide the file from colleagues
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def write(folder: Path, step: int, arrays: dict[str, Arrays], meta: dict[str, Any]) -> None:
    """Hash everything in `folder` and commit the step."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME)
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = list(pool.map(_sha256, paths))
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {
            str(path.relative_to(folder)): {"sha256": digest, "size": path.stat().st_size}
            for path, digest in zip(paths, hashes, strict=True)
        },
        "arrays": arrays,
        "meta": meta,
    }
    body["sha256"] = _own_hash(body)
    write_atomic(folder / NAME, json.dumps(body, indent=1).encode())


def read(folder: Path) -> Manifest:
    """Manifest of a step folder; `Damaged` if it is absent or altered. Files are not looked at."""
    path = folder / NAME
    if not path.is_file():
        raise Damaged(f"{path} is missing: the save did not finish, or this is not a checkpoint")
    try:
        body = json.loads(path.read_bytes())
        claimed = body.pop("sha256")
        version = body["format_version"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Damaged(f"{path} is not a manifest: {e!r}") from e
    if claimed != _own_hash(body):
        raise Damaged(f"{path} was altered: it does not match its own sha256")
    if version != FORMAT_VERSION:
        # Not damage: falling back to an older step would be the wrong answer.
        raise UserError(
            f"{path}: format_version {version}, this version reads {FORMAT_VERSION}; "
            "use the hydrajax version that wrote it."
        )
    arrays = {
        tree: {key: (tuple(shape), dtype) for key, (shape, dtype) in leaves.items()}
        for tree, leaves in body["arrays"].items()
    }
    return Manifest(body["step"], body["files"], arrays, body["meta"])


def verify(folder: Path, *, hashes: bool = True) -> Manifest:
    """Read the manifest and compare every file with it; `Damaged` names the first that differs."""
    manifest = read(folder)
    if folder.name != str(manifest.step):
        raise Damaged(f"{folder / NAME} is of step {manifest.step}, the folder was renamed")
    for name, want in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != want["size"]:
            raise Damaged(f"{path} has {path.stat().st_size} bytes, expected {want['size']}")
    if hashes:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            found = pool.map(_sha256, [folder / name for name in manifest.files])
            for (name, want), got in zip(manifest.files.items(), found, strict=True):
                if got != want["sha256"]:
                    raise Damaged(f"{folder / name} was altered: its sha256 differs")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
