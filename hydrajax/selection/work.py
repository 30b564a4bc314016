"""Work: long measurements in parts that are shown as they pass, and kept should the run be killed.

A part is named after what it measures and carries the identity of everything it depends on
(teacher, settings, text); a part of another identity is measured again.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hydrajax.manifest import write_atomic


class Work:
    """Runs measurements part by part; `folder` None keeps nothing."""

    def __init__(self, folder: Path | None = None, identity: Any = None, *, show: bool = False):
        self.folder, self.identity = folder, identity
        text = json.dumps(identity, sort_keys=True, default=str)
        self._key = hashlib.sha256(text.encode()).hexdigest()[:16]
        columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn())  # fmt: skip
        self._progress = Progress(*columns, transient=True) if show else None

    def shown(self) -> AbstractContextManager:
        """Within this context the progress is on the terminal."""
        return self._progress or nullcontext()

    def each(
        self, name: str, items: Sequence, measure: Callable[[Any], np.ndarray]
    ) -> list[np.ndarray]:
        """Measure every item, or read what an earlier run measured."""
        task = self._progress.add_task(name, total=len(items)) if self._progress else None
        out = []
        for i, item in enumerate(items):
            out.append(self._part(f"{name}.{i}", lambda item=item: measure(item)))
            if self._progress:
                self._progress.advance(task)
        return out

    def clear(self) -> None:
        """Forget the parts: the result is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, name: str, measure: Callable[[], np.ndarray]) -> np.ndarray:
        if self.folder is None:
            return np.asarray(jax.device_get(measure()))
        path = self.folder / f"{name}.{self._key}.npy"
        if path.is_file():
            return np.load(path, allow_pickle=False)
        value = np.asarray(jax.device_get(measure()))
        self.folder.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        np.save(data, value, allow_pickle=False)
        write_atomic(path, data.getvalue())
        return value
