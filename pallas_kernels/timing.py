"""Time programs against each other on one device: in turns, several calls at a time.

A device is given work without waiting for it, so one call is timed by many: `calls` of them are
started back to back and the last one is awaited. Programs take turns, repeat after repeat, so that
a clock that drifts drifts for all of them.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

__all__ = ["Clock", "Program", "interleaved"]

MOST_CALLS = 50


@dataclasses.dataclass(frozen=True)
class Program:
    """`call()` starts the work and returns its results, `wait(results)` waits for all of it."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready


@dataclasses.dataclass(frozen=True)
class Clock:
    """Seconds left of those that a command may take."""

    limit: float
    start: float = dataclasses.field(default_factory=time.perf_counter)

    def left(self) -> float:
        return self.limit - (time.perf_counter() - self.start)


def interleaved(
    programs: Mapping[str, Program], repeats: int = 7, seconds: float = 0.02
) -> tuple[dict[str, dict], dict[str, str]]:
    """Return {name: {"ms": median, "ms_all": [...], "calls": n}} and {name: error} of the failed.

    `seconds` is about how long the calls of one repeat take together.
    """
    calls, errors = {}, {}
    for name, program in programs.items():
        try:
            program.wait(program.call())
            once = _seconds(program, 1)
        except Exception as error:  # a peer's failure is a result, not the end of the run
            errors[name] = describe(error)
        else:
            calls[name] = max(1, min(MOST_CALLS, round(seconds / once)))
    readings = {name: [] for name in calls}
    for _ in range(repeats):
        for name in calls:
            readings[name].append(_seconds(programs[name], calls[name]) / calls[name] * 1e3)
    times = {
        name: {
            "ms": round(statistics.median(values), 5),
            "ms_all": [round(value, 5) for value in values],
            "calls": calls[name],
        }
        for name, values in readings.items()
    }
    return times, errors


def describe(error: BaseException, most: int = 500) -> str:
    """One line, or the end of a long one, where compilers say what is wrong."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= most else '... ' + text[-most:]}"


def _seconds(program: Program, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        results = program.call()
    program.wait(results)
    return time.perf_counter() - begin
