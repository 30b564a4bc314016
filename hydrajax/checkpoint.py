"""Checkpoints of a run: saved in the background, whole or ignored, compared before restoring.

`<run>/checkpoints/<step>/` holds what Orbax writes for "params" and "opt_state", each one flat
dict of arrays, `data.json` with the position in the data, and `manifest.json`. All file access
of runs goes through here; paths are local (remote ones would change this module and no other).
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from hydrajax import distributed, manifest
from hydrajax.array_tree import (
    abstract_leaf,
    compare,
    describe,
    empty_leaf,
    flatten,
    hash_params,
    size,
    without_empty,
)
from hydrajax.manifest import Damaged, Manifest
from hydrajax.run_folder import RunInfo, listing, read_config, write_config
from hydrajax.typing import Params, UserError

__all__ = ["CheckpointStore", "Run", "RunInfo", "files_hash", "hash_params", "load_run",
           "make_lineage", "params_hash", "read_config", "write_config"]  # fmt: skip

DATA = "data.json"
REMOVING = ".removing"  # a step on its way out; what a kill leaves of it is temporary
TEMPORARY = (".orbax-checkpoint-tmp", REMOVING)
SAVE_TIMEOUT_S = 1200

log = logging.getLogger("hydrajax")


@dataclass(frozen=True)
class Run:
    """A run with the parameters of one step, as numpy arrays."""

    info: RunInfo
    step: int
    params: Params


class CheckpointStore:
    """The checkpoints of one run folder. `verify=False` trusts file sizes instead of hashes."""

    def __init__(self, folder: str | Path, *, keep: int = 2, verify: bool = True):
        self.root = Path(folder).absolute() / "checkpoints"
        self.keep, self.verify = keep, verify
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._pending_step = -1
        self._whole: set[int] = set()  # steps written or verified by this object
        self._tidy = False

    # -- writing -------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        *,
        params: Params,
        opt_state: Any = None,
        data: Any = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        """Copy to the host and return; files and manifest are written in the background.

        `data` is the same on all processes, which walk over one stream: any number may resume.
        Raises `UserError` if this save cannot start, or if the one before it failed.
        """
        self.wait()
        if distributed.decide_once(lambda: int(step in self._steps() and self._is_whole(step))):
            log.warning("%s is whole already and is kept as it is.", self._path(step))
            return
        trees = {"params": dict(params)}
        if opt_state is not None:
            trees["opt_state"] = flatten(opt_state)
        arrays = {name: describe(tree) for name, tree in trees.items()}
        # Now, not in the background: the position goes on with the next batch.
        position = None if data is None else json.dumps(data, default=_plain).encode()
        try:
            self._prepare()
            with _orbax_context():
                response = ocp.save_checkpointables_async(
                    self._path(step), without_empty(trees), overwrite=True
                )
        except Exception as e:
            raise self._not_written(step, e) from e

        def commit() -> None:
            response.result(timeout=SAVE_TIMEOUT_S)
            if distributed.is_lead():
                folder = self._path(step)
                if position is not None:
                    manifest.write_atomic(folder / DATA, position)
                manifest.write(folder, step, arrays, meta or {})
                self._whole.add(step)
                self._prune()

        self._pending, self._pending_step = self._pool.submit(commit), step

    def wait(self) -> None:
        """Return when the save under way is committed; `UserError` if it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as e:
            raise self._not_written(self._pending_step, e) from e

    def close(self) -> None:
        """`wait`, then release the thread; reading stays possible."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _prepare(self) -> None:
        """Make the folder; the first save also clears what a killed run left half-done.

        Readers never clear anything: the temporary folder they see may belong to a live run.
        """
        if not distributed.is_lead():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        if not self._tidy:
            for path in self.root.iterdir():
                if any(mark in path.name for mark in TEMPORARY):
                    log.warning("Removing %s, left by an interrupted run.", path)
                    shutil.rmtree(path)
            self._tidy = True

    def _prune(self) -> None:
        """Delete all but the newest `keep` whole steps; damaged ones are left as evidence."""
        whole = [step for step in sorted(self._steps(), reverse=True) if self._is_whole(step)]
        for step in whole[self.keep :]:
            doomed = self.root / f"{step}{REMOVING}"
            os.replace(self._path(step), doomed)  # a kill must not leave half a step
            shutil.rmtree(doomed)

    def _not_written(self, step: int, e: Exception) -> UserError:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        return UserError(
            f"Checkpoint {self._path(step)} was not written ({reason}). Check free space and "
            "permissions, then start the same command again to resume from the step before."
        )

    # -- reading -------------------------------------------------------------------------------

    def newest_valid(self, strict: bool = False) -> int | None:
        """Newest whole step or None; damaged ones are skipped with a warning, if strict raise."""
        self.wait()
        step = distributed.decide_once(lambda: self._newest_valid(strict))
        return None if step < 0 else step

    def restore_params(self, step: int, target: Mapping[str, Any] | None = None) -> Params:
        """Parameters as numpy arrays, or with a target's shardings as jax arrays."""
        stored = self._open(step)
        return self._load(step, stored, {"params": target})["params"]

    def restore(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        """Arrays in the structure of `target` {"params", "opt_state"}, with "data" and "meta".

        Leaves of the target are `jax.ShapeDtypeStruct`s; those with a sharding come back as jax
        arrays on these devices, whatever devices wrote them. Shapes and dtypes must be equal.
        """
        stored = self._open(step)
        flat = {name: flatten(tree) for name, tree in target.items()}
        loaded = self._load(step, stored, flat)
        out: dict[str, Any] = {"data": self._read_data(step), "meta": stored.meta}
        for name, tree in target.items():
            leaves = [loaded[name][key] for key in flat[name]]
            out[name] = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        return out

    def why_not(self) -> str:
        """What lies in the place of checkpoints, for errors."""
        return f"looked in {self.root}, found: {listing(self.root)}"

    def _newest_valid(self, strict: bool) -> int:
        for step in sorted(self._steps(), reverse=True):
            try:
                self._verify(step)
                return step
            except Damaged as e:
                text = f"Checkpoint step {step} is damaged: {e}."
                if strict:
                    raise UserError(f"{text} Remove {self._path(step)} to go on without it.") from e
                log.warning("%s Trying the step before it.", text)
        return -1

    def _steps(self) -> list[int]:
        if not self.root.is_dir():
            return []
        names = [p.name for p in self.root.iterdir() if p.is_dir()]
        return [int(n) for n in names if n.isdecimal() and str(int(n)) == n]

    def _path(self, step: int) -> Path:
        return self.root / str(step)

    def _verify(self, step: int) -> Manifest:
        hashes = self.verify and step not in self._whole
        found = manifest.verify(self._path(step), hashes=hashes)
        self._whole.add(step)
        return found

    def _is_whole(self, step: int) -> bool:
        try:
            self._verify(step)
        except Damaged:
            return False
        return True

    def _open(self, step: int) -> Manifest:
        self.wait()
        if step not in self._steps():
            raise UserError(f"No checkpoint of step {step} ({self.why_not()}).")
        try:
            return self._verify(step)
        except Damaged as e:
            raise UserError(f"Checkpoint step {step} is damaged: {e}. Choose another step.") from e

    def _load(
        self, step: int, stored: Manifest, wanted: Mapping[str, Mapping[str, Any] | None]
    ) -> dict[str, dict[str, Any]]:
        """Load whole trees; a wanted tree of None comes as numpy. Empty arrays are not on disk."""
        abstract: dict[str, dict[str, Any]] = {}
        for name, target in wanted.items():
            found = stored.arrays.get(name)
            if found is None:
                raise UserError(
                    f"{self._path(step)} holds no {name}, only {sorted(stored.arrays)}; imported "
                    "weights cannot be resumed, start a new run from them."
                )
            if target is not None:
                compare(f"{self._path(step)}: {name}", describe(target), found)
            target = target or {}
            abstract[name] = {key: abstract_leaf(*found[key], target.get(key)) for key in found}
        full = without_empty(abstract)
        try:
            loaded = ocp.load_checkpointables(self._path(step), full) if full else {}
        except Exception as e:
            raise UserError(f"{self._path(step)} cannot be read: {type(e).__name__}: {e}") from e
        return {
            name: {key: loaded[name][key] if size(leaf) else empty_leaf(leaf)
                   for key, leaf in tree.items()}
            for name, tree in abstract.items()
        }  # fmt: skip

    def _read_data(self, step: int) -> Any:
        path = self._path(step) / DATA
        if not path.is_file():
            return None
        position = json.loads(path.read_bytes())
        if not isinstance(position, list):
            return position
        if any(other != position[0] for other in position):  # one for each process, once
            raise UserError(f"{path} holds {len(position)} positions in the data that differ.")
        return position[0]


def load_run(folder: str | Path, step: int | None = None) -> Run:
    """Config and parameters of a run, at its newest whole step unless one is given."""
    info = read_config(folder)
    store = CheckpointStore(folder)
    step = _newest(store) if step is None else step
    return Run(info, step, store.restore_params(step))


def _newest(store: CheckpointStore) -> int:
    step = store.newest_valid()
    if step is None:
        raise UserError(
            f"No checkpoint in {store.root.parent} ({store.why_not()}). Run the stage that writes "
            "it, or name another folder."
        )
    return step


def files_hash(folder: str | Path) -> str:
    """Hash of what the manifest of a run's newest whole step says of its files.

    Equal as long as nobody writes the folder again, and found without reading a weight; equal
    weights written twice have different files, and one `params_hash`.
    """
    store = CheckpointStore(folder, verify=False)
    files = manifest.read(store.root / str(_newest(store))).files
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def params_hash(folder: str | Path) -> str:
    """`hash_params` of a run's newest whole step."""
    return hash_params(load_run(folder).params)


def make_lineage(command: list[str], parent: str | Path | None) -> dict[str, Any]:
    """Where a folder comes from: command, versions, commit, date, and the parent's weights."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "command": list(command),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": None if parent is None else str(parent),
        "parent_hash": None if parent is None else params_hash(parent),
    }


def _plain(x: Any) -> Any:
    """numpy scalars and arrays, for JSON."""
    return x.tolist()


def _commit() -> str | None:
    """Commit of this source tree, "+" appended if it has changes; None outside of git."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=here.parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    here = Path(__file__).resolve()
    try:
        git("ls-files", "--error-unmatch", here.name)  # installed inside another project's tree?
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _orbax_context() -> ocp.Context:
    context = ocp.Context()
    # Made in the background, a folder that cannot be made shows only as a time-out.
    context.asynchronous.create_directories_asynchronously = False
    context.asynchronous.timeout_secs = SAVE_TIMEOUT_S
    return context
