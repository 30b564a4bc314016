"""What a run reports: honest rates, one console line a log step, `metrics.jsonl`, TensorBoard.

`metrics.jsonl` is the record: one JSON object a line, {"step": ..., metric: value}. No writer may
stop a run: one that fails is dropped with a warning and training goes on.
"""

import atexit
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hydrajax.distributed import is_lead
from hydrajax.flops import mfu, peak_flops, train_flops_per_token
from hydrajax.manifest import write_atomic

__all__ = ["Chrono", "MetricWriter", "mfu", "peak_flops", "sparkline", "train_flops_per_token"]

BARS = "▁▂▃▄▅▆▇█"

log = logging.getLogger("hydrajax")


class Chrono:
    """Rates of training alone, without the first step (it compiles) and pauses (evaluation)."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start: float | None = None  # of the interval; None before the first step ends
        self._tokens = self._steps = 0
        self._waited = self._paused = 0.0

    def tick(self, tokens: int) -> None:
        """A step of so many tokens was given to the device."""
        if self._start is None:
            self._reset()
            return
        self._tokens += tokens
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def rates(self) -> dict[str, float]:
        """Rates since the last call; zeros while only the first step has run.

        Call it when the device has finished, i.e. after reading a metric of the last step.
        """
        elapsed = 0.0 if self._start is None else self._clock() - self._start - self._paused
        steps, tokens, waited = self._steps, self._tokens, self._waited
        self._reset()
        if not steps or elapsed <= 0:
            return {"tokens_per_s": 0.0, "step_s": 0.0, "data_wait": 0.0}
        return {
            "tokens_per_s": tokens / elapsed,
            "step_s": elapsed / steps,
            "data_wait": waited / elapsed,  # fraction of the time
        }

    def _reset(self) -> None:
        self._start = self._clock()
        self._tokens = self._steps = 0
        self._waited = self._paused = 0.0


class MetricWriter:
    """Console, metrics.jsonl and TensorBoard of one run, on the first process only.

    Records after `start_step` are dropped from an existing file: the run repeats those steps.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        start_step: int = 0,
        total_steps: int,
        stage: str,
        tensorboard: bool = False,
    ):
        self.folder = Path(folder)
        self._writers: list[_Jsonl | _Console | _TensorBoard] = []
        if not is_lead():
            return
        self._add(lambda: _Jsonl(self.folder / "metrics.jsonl", start_step))
        self._add(lambda: _Console(stage, total_steps))
        if tensorboard:
            self._add(lambda: _TensorBoard(self.folder / "tensorboard", start_step))

    def log(self, step: int, values: dict[str, float]) -> None:
        for writer in list(self._writers):
            self._guard(writer, partial(writer.log, step, values))

    def close(self) -> None:
        for writer in list(self._writers):
            self._guard(writer, writer.close)

    def _add(self, make: Callable[[], Any]) -> None:
        try:
            self._writers.append(make())
        except Exception as e:
            log.warning("Metrics go without a writer: %s: %s", type(e).__name__, e)

    def _guard(self, writer: Any, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as e:
            self._writers.remove(writer)
            name = type(writer).__name__.strip("_")
            log.warning("%s is given up, training goes on: %s: %s", name, type(e).__name__, e)


class _Jsonl:
    """Append-only; every line is flushed, so that a kill costs at most the line under way."""

    def __init__(self, path: Path, start_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._seen = _rewind(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: dict[str, float]) -> None:
        # Training and evaluation may both report a step; neither does so twice.
        kind = (step, frozenset(values))
        if kind in self._seen:
            return
        self._seen = {k for k in self._seen if k[0] == step} | {kind}
        # JSON knows no NaN; null is what every reader understands.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _rewind(path: Path, step: int) -> set[tuple[int, frozenset[str]]]:
    """Drop records after `step` and lines cut by a kill; returns the records at `step`."""
    if not path.is_file():
        return set()
    old, lines, seen = path.read_bytes(), [], set()
    for line in old.splitlines(keepends=True):
        try:
            record = json.loads(line)
            known = record["step"] <= step and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError):
            known = False
        if known:
            lines.append(line)
            if record["step"] == step:
                seen.add((step, frozenset(record) - {"step"}))
    if b"".join(lines) != old:
        write_atomic(path, b"".join(lines))
    return seen


class _Console:
    """One live line on a terminal, which evaluations and the end leave behind; else plain lines."""

    def __init__(self, stage: str, total_steps: int):
        self._stage, self._total = stage, total_steps
        self._live: Live | None = None
        if sys.stdout.isatty():
            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()
            atexit.register(self._live.stop)  # an error must not leave the cursor hidden

    def log(self, step: int, values: dict[str, float]) -> None:
        line = format_line(self._stage, step, self._total, values)
        if self._live is None:
            print(line, flush=True)
        elif any(name.startswith("eval/") for name in values):
            self._live.console.print(Text(line))
        else:
            self._live.update(Text(line), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


class _TensorBoard:
    """Scalars for TensorBoard through tensorboardX, an optional package."""

    def __init__(self, folder: Path, start_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as e:
            raise ImportError(f"{e}; `pip install tensorboardX`, or leave train.tensorboard") from e
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def format_line(stage: str, step: int, total: int, values: dict[str, float]) -> str:
    """`distill  1200/20000  6.0%  loss 1.834 (kl 1.42 ce 0.41)  |g| 0.83 ...`, of what there is."""
    parts = [stage, f"{step}/{total}", f"{100 * step / total:.1f}%"]
    for split, label in (("train", "loss"), ("eval", "eval loss")):
        if f"{split}/loss" in values:
            inner = [f"{k} {values[f'{split}/{k}']:.2f}" for k in ("kl", "ce")
                     if f"{split}/{k}" in values]  # fmt: skip
            terms = f" ({' '.join(inner)})" if len(inner) > 1 else ""
            parts.append(f"{label} {values[f'{split}/loss']:.4g}{terms}")
    cosines = [v for k, v in values.items() if k.endswith("/cosine")]
    if cosines:
        parts.append(f"cos {sum(cosines) / len(cosines):.3f}")
    if "train/grad_norm" in values:
        parts.append(f"|g| {values['train/grad_norm']:.2g}")
    if "train/lr" in values:
        parts.append(f"lr {values['train/lr']:.1e}")
    if values.get("perf/tokens_per_s"):
        parts.append(f"{_short(values['perf/tokens_per_s'])} tok/s")
        if "perf/mfu" in values:
            parts.append(f"MFU {100 * values['perf/mfu']:.0f}%")
        if step < total:
            parts.append(f"ETA {_duration((total - step) * values.get('perf/step_s', 0))}")
    if values.get("train/nonfinite"):
        parts.append(f"NOT FINITE in {values['train/nonfinite']:.0f} steps")
    return "  ".join(parts)


def sparkline(counts: Sequence[int], total: int) -> str:
    """One bar a layer: FA heads among all heads; a dot where there are none."""
    bars = ("·" if c == 0 else BARS[math.ceil(len(BARS) * c / total) - 1] for c in counts)
    return "".join(bars)


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}"
    return f"{minutes}m{seconds:02d}" if minutes else f"{seconds}s"
