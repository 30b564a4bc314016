"""Find the best number of segments of the delta rule's sequences on this Hopper GPU, and keep it.

    python -m pallas_kernels.tune --shapes 1x32768x16,1x131072x16 [--dim 128] [--limit 240]

For every shape (rows, tokens, heads) forward is timed with each number of segments, in turns, then
forward and backward with each number of the backward's. Gates are slow, so that nothing is
forgotten. Entries of other shapes stay in pallas_kernels/tuned/<device>.json; a shape for which
`--limit` does not suffice is left as it was.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.bench import make_meta, shapes_of, write
from pallas_kernels.gated_delta_rule import api, tuned
from pallas_kernels.gated_delta_rule.mosaic_gpu_segments import (
    MODEL,
    most_segments,
    of_one_length,
)
from pallas_kernels.gated_delta_rule.workload import ARGUMENTS, CHUNK, draw
from pallas_kernels.timing import Clock, Program, interleaved

GAIN = 0.98  # of the time of the model's choice: less is noise
RESERVE = 60  # seconds that a shape needs


def candidates(heads: int, chunks: int, dim: int, model: int) -> list[int]:
    """Numbers of segments to time: powers of two and what is near to the model's."""
    most = most_segments(heads, chunks, dim)
    asked = [n for n in (*(2**i for i in range(8)), model - 1, model, model + 1) if 1 <= n <= most]
    return sorted({of_one_length(n, chunks) for n in (*asked, model)})


def best(times: dict[int, float], model: int) -> int:
    """The fastest, if it is faster than the model's choice by more than noise."""
    fastest = min(times, key=times.get)
    return fastest if times[fastest] < GAIN * times[model] else model


def tune(dims: tuple[int, int, int, int], repeats: int, seconds: float) -> dict[str, dict]:
    """Return each pass's best number for (B, T, R, d), the model's, and milliseconds by number.

    Those of the backward are of both passes, with the forward's best number.
    """
    place, arrays = _place(dims), draw(dims, "slow")
    model = {of: count(*place) for of, count in MODEL.items()}
    found = {"best": dict(model), "model": model, "ms": {}}
    for of in tuned.PASSES:
        numbers = candidates(*place, model[of])
        times, failed = interleaved(_programs(of, found["best"], numbers, arrays), repeats, seconds)
        if failed:
            raise RuntimeError(f"{of} of {dims}: {failed}")
        found["ms"][of] = {int(n): time["ms"] for n, time in times.items()}
        found["best"][of] = best(found["ms"][of], model[of])
    return found


def _place(dims: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Recurrences, chunks, dims."""
    B, T, R, d = dims
    return B * R, -(-T // CHUNK), d


def _programs(of: str, entry: dict, numbers: list[int], arrays: dict) -> dict[str, Program]:
    """Compiled side by side."""
    names = (*ARGUMENTS, "do") if of == "backward" else ARGUMENTS
    operands = [arrays[name] for name in names]

    def compiled(n: int) -> Program:
        run = jax.jit(_call(of, entry | {of: n})).lower(*operands).compile()
        return Program(lambda: run(*operands))

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(map(str, numbers), pool.map(compiled, numbers), strict=True))


def _call(of: str, entry: dict[str, int]) -> Callable:
    config = api.GatedDeltaConfig(chunk=CHUNK, segments=tuple(entry[name] for name in tuned.PASSES))

    def forward(*x):
        return api.gated_delta_rule(*x, config=config, implementation=hopper.NAME)

    def both(*x):
        *x, do = x
        (_, state), vjp = jax.vjp(forward, *x)
        return vjp((do, jnp.zeros_like(state)))

    return forward if of == "forward" else both


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune")
    parser.add_argument("--shapes", type=shapes_of, required=True, help="BxTxR,...")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.02, help="about how long a repeat takes")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds")
    parser.add_argument("--folder", type=Path, default=tuned.FOLDER)
    args = parser.parse_args(arguments)
    clock, kind = Clock(args.limit), jax.devices()[0].device_kind
    try:
        hopper.check_version()
        hopper.check_device(kind)
    except NotImplementedError as error:
        sys.exit(f"python -m pallas_kernels.tune: {error}")
    if args.folder.exists() and not args.folder.is_dir():
        sys.exit(f"--folder {args.folder}: expected a folder, found a file")
    path = tuned.path_of(kind, args.folder)
    try:
        report = tuned.read(path)
    except ValueError as error:
        sys.exit(str(error))
    run = make_meta("tune", arguments)
    for shape in args.shapes:
        if clock.left() < RESERVE:
            sys.exit(f"{path}: the time was up before {shape}")
        dims = (*shape, args.dim)
        found = tune(dims, args.repeats, args.seconds)
        name = tuned.key(*_place(dims))
        report["segments"][name] = found.pop("best")
        report["measured"][name] = found | {"dims": dims, "run": run}
        write(path, report)
        print(f"{name}: {report['segments'][name]}, by the model {found['model']}", flush=True)


if __name__ == "__main__":
    main()
