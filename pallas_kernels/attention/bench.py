"""What `python -m pallas_kernels.bench --op attention` measures: time, error, packed documents.

FLOPs are those inside the causal triangles, 2 T^2 H a query head forward and 2.5 times that
backward: recomputed scores are an implementation's own affair.

    B batch   T tokens   N query heads   H head dim
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import api, peers
from pallas_kernels.timing import Clock, Program, describe, interleaved

__all__ = ["WORDS", "Options", "rows", "summary"]

PARTS = ("error", "time", "packed")
INPUTS = ("causal", "documents")
RESERVE = 15  # seconds that a part needs at the least
LATE = "not run: the time was up"
WORDS = {
    "ratios": "vs: the peer's milliseconds by ours; packed_vs_cudnn: of the worse direction",
    "tflops": "of the causal triangles alone, 2 T^2 H a query head forward, 3.5 times that in both",
}  # what the figures are


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run: `shapes` are (B, T, N), `groups` the query heads of a key head.

    `document` is the length of packed documents in rows of the last shape, `twin` the tokens of
    the row whose errors are measured, `seconds` about how long the calls of a repeat take.
    """

    shapes: tuple[tuple[int, int, int], ...] = ((1, 4096, 16), (1, 16384, 16), (1, 32768, 16))
    implementations: tuple[str, ...] = ("mosaic_gpu", "cudnn")
    parts: tuple[str, ...] = PARTS
    groups: int = 2
    document: int = 4096
    dim: int = 128
    repeats: int = 7
    seconds: float = 0.1
    twin: int = 1000
    seed: int = 0

    def __post_init__(self):
        known = tuple(api.IMPLEMENTATIONS)
        if unknown := [name for name in self.implementations if name not in known]:
            raise ValueError(f"implementations: expected some of {known}, got {unknown}")
        if unknown := [name for name in self.parts if name not in PARTS]:
            raise ValueError(f"parts: expected some of {PARTS}, got {unknown}")
        if wrong := [shape for shape in self.shapes if shape[2] % self.groups]:
            raise ValueError(f"shapes: expected heads in groups of {self.groups}, got {wrong}")


def rows(options: Options, clock: Clock) -> Iterator[dict]:
    """Yield one row per implementation and shape, and per error measured."""
    found = {
        "error": lambda: _error_rows(options, clock),
        "time": lambda: (r for shape in options.shapes for r in _time_rows(options, clock, shape)),
        "packed": lambda: _packed_rows(options, clock),
    }
    for part in PARTS:
        if part in options.parts:
            yield from found[part]()


def flops(what: str, dims: tuple[int, int, int, int], document: int | None = None) -> float:
    """Of B rows of T tokens, cut into documents of one length."""
    B, T, N, H = dims
    forward = 2.0 * B * N * H * T * (document or T)
    return forward if what == "fwd" else 3.5 * forward


def _time_rows(options: Options, clock: Clock, shape) -> Iterator[dict]:
    runs = {
        name: functools.partial(api.attention, implementation=name)
        for name in options.implementations
    }
    base = {"what": "time", "shape": _label(shape[1]), "dims": (*shape, options.dim)}
    yield from _measured(options, clock, base, runs)


def _packed_rows(options: Options, clock: Clock) -> Iterator[dict]:
    """Rows of the last shape, full of documents of equal length."""
    B, T, _ = shape = options.shapes[-1]
    if T % options.document:
        yield {"what": "packed", "error": f"documents of {options.document} do not fill {T}"}
        return
    ids = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // options.document, (B, T))
    runs = {
        name: functools.partial(api.attention, segment_ids=ids, implementation=name)
        for name in options.implementations
        if name != "cudnn"
    }
    base = {"what": "packed", "shape": _label(T), "dims": (*shape, options.dim)}
    base |= {"document": options.document}
    failed = {}
    for name, make in peers.PACKED.items():
        try:
            runs[name] = make(options.document)
        except Exception as error:  # what private code does is a result, not the end of the run
            failed[name] = describe(error)
    yield from _measured(options, clock, base, runs)
    yield from ({**base, "implementation": name, "error": e} for name, e in failed.items())


def _measured(options: Options, clock: Clock, base: dict, runs: dict[str, Callable]):
    """Forward and both directions of every run, in turns."""
    if clock.left() < RESERVE:
        yield from ({**base, "implementation": name, "error": LATE} for name in runs)
        return
    arrays = _draw(base["dims"], options.groups, options.seed)
    found, failed = {}, {}
    for name, run in runs.items():
        for what, program in _programs(run).items():
            try:
                compiled = jax.jit(program).lower(*arrays).compile()
                found[name, what] = Program(functools.partial(compiled, *arrays))
            except Exception as error:
                failed[name, what] = describe(error)
    times, broken = interleaved(found, options.repeats, options.seconds)
    for name in runs:
        row = base | {"implementation": name}
        for what in ("fwd", "fwdbwd"):
            if (name, what) in times:
                time = times[name, what]
                work = flops(what, base["dims"], base.get("document"))
                row |= {f"{what}_{key}": value for key, value in time.items()}
                row[f"{what}_tflops"] = round(work / time["ms"] / 1e9, 1)
        wrong = {w: e for (n, w), e in (failed | broken).items() if n == name}
        yield row | ({"error": wrong} if wrong else {})


def _programs(run: Callable) -> dict[str, Callable]:
    def both(q, k, v, do):
        o, vjp = jax.vjp(run, q, k, v)
        return o, *vjp(do)

    return {"fwd": lambda q, k, v, do: run(q, k, v), "fwdbwd": both}


def _error_rows(options: Options, clock: Clock) -> Iterator[dict]:
    """Relative L2 errors of o and the gradients against float64, on one ragged row."""
    dims = (1, options.twin, options.shapes[0][2], options.dim)
    arrays = _draw(dims, options.groups, options.seed)
    cuts = np.array([1 / 7, 1 / 6, 0.6, 0.61]) * options.twin
    ids = np.searchsorted(cuts, np.arange(options.twin), side="right").astype(np.int32)[None]
    for inputs in INPUTS:
        call = functools.partial(api.attention, segment_ids=ids if inputs == "documents" else None)
        want = _exact(functools.partial(call, implementation="reference"), arrays)
        for name in options.implementations:
            row = {"what": "error", "implementation": name, "inputs": inputs, "dims": dims}
            if clock.left() < RESERVE:
                yield row | {"error": LATE}
                continue
            try:
                run = _programs(functools.partial(call, implementation=name))["fwdbwd"]
                got = [np.asarray(x, np.float64) for x in jax.jit(run)(*arrays)]
            except Exception as error:
                yield row | {"error": describe(error)}
                continue
            parts = zip(("o", "dq", "dk", "dv"), got, want, strict=True)
            yield row | {"errors": {n: _relative(x, y) for n, x, y in parts}}


def _exact(run: Callable, arrays) -> list[np.ndarray]:
    """In float64 on the host."""
    wide = [np.asarray(x).astype(np.float64) for x in arrays]
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return [np.asarray(x) for x in jax.jit(_programs(run)["fwdbwd"])(*map(jnp.asarray, wide))]


def _relative(got, want) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _draw(dims, groups: int, seed: int):
    B, T, N, H = dims
    keys = jax.random.split(jax.random.key(seed), 4)
    heads = (N, N // groups, N // groups, N)
    draws = zip(keys, heads, strict=True)
    return [jax.random.normal(key, (B, T, n, H), jnp.bfloat16) for key, n in draws]


def _label(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def summary(rows: list[dict], subject: str = "mosaic_gpu") -> dict[str, float]:
    """`vs` is our speed over a peer's, above 1 we are faster; errors are the largest."""
    found: dict[str, float] = {}
    for row in rows:
        if row.get("implementation") == subject and "errors" in row:
            worst = max(row["errors"].values())
            found["max_rel_err"] = max(found.get("max_rel_err", 0.0), worst)
    timed = [row for row in rows if row["what"] in ("time", "packed") and "shape" in row]
    ours = {(r["what"], r["shape"]): r for r in timed if r["implementation"] == subject}
    for row in timed:
        name, shape = row["implementation"], row["shape"]
        for what in (w for w in ("fwd", "fwdbwd") if f"{w}_ms" in row):
            key = what if row["what"] == "time" else f"packed_{what}"
            mine = ours.get((row["what"], shape), {}).get(f"{what}_ms")
            if name == subject:
                found[f"{key}_ms_{shape}"] = row[f"{what}_ms"]
                found[f"{key}_tflops_{shape}"] = row[f"{what}_tflops"]
            elif mine is not None:
                found[f"{key}_vs_{name}_{shape}"] = round(row[f"{what}_ms"] / mine, 3)
    peer = [f"packed_{what}_vs_cudnn_packed" for what in ("fwd", "fwdbwd")]
    for shape in {row["shape"] for row in timed if row["what"] == "packed"}:
        both = [found[f"{name}_{shape}"] for name in peer if f"{name}_{shape}" in found]
        if both:
            found[f"packed_vs_cudnn_{shape}"] = min(both)
    return found
