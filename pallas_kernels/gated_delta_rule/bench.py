"""What `python -m pallas_kernels.bench --op gated_delta_rule` measures: time, error and memory.

Every shape is run with strong gates and with slow ones: implementations that skip what decays are
faster on the former. A floor is the larger of FLOPs at the tensor cores' rate (`RATES`) and bytes
at the rate of a copy, measured here (`workload.py` counts both).

    B batch   T tokens   R heads   d = H = E dims
"""

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import api, peers
from pallas_kernels.gated_delta_rule.workload import (
    ARGUMENTS,
    GATES,
    INPUTS,
    draw,
    errors,
    exact,
    flops,
    named,
    parts,
    programs,
    traffic,
)
from pallas_kernels.timing import Clock, Program, describe, interleaved

__all__ = ["WORDS", "Options", "rows", "summary"]

PARTS = ("time", "decode", "error", "kernels")
WHATS = ("fwd", "fwd_residuals", "fwdbwd")
RATES = {"H100": 745e12, "H200": 745e12}  # bf16, an XLA product of 4096^3 on an H100
DECODE_HEADS = 16
RESERVE = 20  # seconds that a shape needs at the least
LATE = "not run: the time was up"
WORDS = {
    "ratios": "vs: our milliseconds by the peer's, of the gate where that is larger",
    "floor": "the larger of FLOPs at the tensor cores' rate and bytes at the rate of a copy",
}  # what the figures are


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run: `shapes` are (B, T, R), `twin` the tokens of the row whose errors are measured.

    `implementations` are ours and peers'; all `parts` but `time` are of the first shape alone;
    `decode` is B of the decode step, `seconds` about how
    long the calls of a repeat take.
    """

    shapes: tuple[tuple[int, int, int], ...] = (
        (8, 4096, 16),
        (1, 32768, 16),
        (1, 131072, 16),
        (8, 4096, 14),
    )
    implementations: tuple[str, ...] = ("mosaic_gpu", "fla", "flashqla", "xla")
    parts: tuple[str, ...] = PARTS
    dim: int = 128
    repeats: int = 7
    seconds: float = 0.02
    twin: int = 512
    decode: int = 256
    seed: int = 0

    def __post_init__(self):
        known = (*api.IMPLEMENTATIONS, *peers.PEERS)
        if unknown := [name for name in self.implementations if name not in known]:
            raise ValueError(f"implementations: expected some of {known}, got {unknown}")
        if unknown := [name for name in self.parts if name not in PARTS]:
            raise ValueError(f"parts: expected some of {PARTS}, got {unknown}")


@dataclasses.dataclass
class _Run:
    """One run: what has been loaded, and why what is missing is."""

    options: Options
    clock: Clock
    copied: float  # bytes per second, read and written
    loaded: dict[str, peers.Peer]
    refused: dict[str, str]

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(n for n in self.options.implementations if n not in peers.PEERS)


def rows(options: Options, clock: Clock) -> Iterator[dict]:
    """Yield one row per implementation, shape and gate, per error measured, and for decoding."""
    copied = _copy_rate(options)
    yield {"what": "copy", "gbps": round(copied / 1e9, 1)}
    run = _Run(options, clock, copied, *_load_peers(options))
    for n, shape in enumerate(options.shapes):
        of = {
            "time": lambda shape=shape: _time_rows(run, shape),
            "decode": lambda: _decode_rows(run),
            "error": lambda: _error_rows(run),
            "kernels": lambda shape=shape: _kernel_rows(run, (*shape, options.dim)),
        }
        for part in PARTS if n == 0 else ("time",):
            if part in options.parts:
                yield from of[part]()


def _time_rows(run: _Run, shape) -> Iterator[dict]:
    dims = (*shape, run.options.dim)
    base = {"what": "time", "shape": "s" + "_".join(map(str, shape)), "dims": dims}
    if run.clock.left() < RESERVE:
        for name in run.options.implementations:
            yield base | {"implementation": name, "error": LATE}
        return
    arrays = {gate: draw(dims, gate, run.options.seed) for gate in GATES}
    built, failed, refused = _build(run, dims, arrays["strong"])
    memory = {n: {what: _memory(p) for what, p in of.items()} for n, of in built.items()}
    for gate in GATES:
        found = {}
        for name in run.options.implementations:
            if name in built:
                of = {what: _bound(p, what, arrays[gate]) for what, p in built[name].items()}
            elif name in run.loaded and name not in refused:
                of = run.loaded[name].programs(arrays[gate])
            else:
                continue
            found |= {(name, what): program for what, program in of.items()}
        times, broken = interleaved(found, run.options.repeats, run.options.seconds)
        for name in run.options.implementations:
            row = base | {"implementation": name, "gates": gate}
            row |= _figures(run, dims, {w: times[name, w] for w in WHATS if (name, w) in times})
            if name in run.loaded:
                row |= {"version": run.loaded[name].version, "note": run.loaded[name].note}
            if name in memory:
                row["memory"] = memory[name]
            wrong = failed.get(name, {}) | {w: e for (n, w), e in broken.items() if n == name}
            if wrong or name in refused:
                row["error"] = refused.get(name, wrong)
            yield row


def _build(run: _Run, dims, arrays):
    """Return ({ours: {what: compiled}}, {ours: {what: why not}}, {peer: why not}).

    Ours compile in threads while peers, which tune by running, do so here.
    """
    built, failed = {}, {}
    refused = dict(run.refused)
    with ThreadPoolExecutor(8) as pool:
        jobs = {
            (name, what): pool.submit(build)
            for name in run.ours
            for what, build in programs(name, dims).items()
        }
        for name, peer in run.loaded.items():
            try:
                if run.clock.left() < 2 * RESERVE:
                    raise TimeoutError(LATE)
                for program in peer.programs(arrays).values():
                    program.wait(program.call())
            except Exception as error:  # a peer's failure is a result, not the end of the run
                refused[name] = describe(error)
        for (name, what), job in jobs.items():
            try:
                built.setdefault(name, {})[what] = job.result()
            except Exception as error:
                failed.setdefault(name, {})[what] = describe(error)
    return built, failed, refused


def _bound(program, what: str, arrays) -> Program:
    operands = [arrays[name] for name in (*ARGUMENTS, *(["do"] if what == "fwdbwd" else []))]
    return Program(functools.partial(program, *operands))


def _memory(program) -> dict[str, int]:
    found = program.memory_analysis()
    peak = getattr(found, "peak_memory_in_bytes", 0)
    return {"temp_bytes": found.temp_size_in_bytes, "peak_bytes": peak}


def _figures(run: _Run, dims, times: dict[str, dict]) -> dict:
    """Milliseconds and the shares of what the device could do, of one implementation."""
    found = {}
    for what, time in times.items():
        work, moved = flops(what, dims), traffic(what, dims)
        floor = _floor(run, work, moved)
        found |= {f"{what}_{figure}": value for figure, value in time.items()} | {
            f"{what}_tflops": round(work / time["ms"] / 1e9, 2),
            f"{what}_gbps": round(moved / time["ms"] / 1e6, 1),
            f"{what}_floor_ms": round(floor, 5),
            f"{what}_floor_share": round(floor / time["ms"], 4),
        }
    return found


def _error_rows(run: _Run) -> Iterator[dict]:
    """Errors of outputs and gradients against the token loop in float64, on a small twin."""
    options = run.options
    dims = (1, options.twin, options.shapes[0][2], options.dim)
    built = {}
    for name in run.ours if run.clock.left() > RESERVE else ():
        try:
            built[name] = programs(name, dims)["fwdbwd"]()
        except Exception as error:
            yield {"what": "error", "implementation": name, "error": describe(error)}
    for inputs in INPUTS:
        if run.clock.left() < RESERVE:
            yield {"what": "error", "inputs": inputs, "error": LATE}
            continue
        arrays = draw(dims, inputs, options.seed)
        want = exact(arrays)
        for name in (*built, *run.loaded):
            row = {"what": "error", "implementation": name, "inputs": inputs, "dims": dims}
            try:
                if name in built:
                    got = named(*_bound(built[name], "fwdbwd", arrays).call())
                else:
                    got = named(*run.loaded[name].results(arrays))
                yield row | {"errors": errors(want, got)}
            except Exception as error:
                yield row | {"error": describe(error)}


def _kernel_rows(run: _Run, dims) -> Iterator[dict]:
    """Which kernels ran, and for how long; the profiler comes with the peers."""
    arrays = draw(dims, "strong", run.options.seed)
    for name in run.options.implementations if run.loaded else ():
        row = {"what": "kernels", "implementation": name, "dims": dims}
        try:
            if name in run.ours:
                program = _bound(programs(name, dims)["fwdbwd"](), "fwdbwd", arrays)
            else:
                program = run.loaded[name].programs(arrays)["fwdbwd"]
            found = peers.kernels(program)
            yield row | {"kernels": found, "breakdown": _breakdown(run, dims, found)}
        except Exception as error:
            yield row | {"error": describe(error)}


def _breakdown(run: _Run, dims, kernels: dict[str, float]) -> dict[str, dict]:
    """Of the kernels that are ours: milliseconds beside what the work and the bytes would take."""
    found = {}
    for part, (work, moved) in parts(dims).items():
        ms = sum(time for name, time in kernels.items() if name.startswith(part))
        if ms:
            floor = _floor(run, work, moved)
            found[part] = {"ms": ms, "floor_ms": round(floor, 5), "share": round(floor / ms, 4)}
    return found


def _floor(run: _Run, work: float, moved: float) -> float:
    """Milliseconds of so many FLOPs and bytes."""
    kind = jax.devices()[0].device_kind
    rate = next((rate for name, rate in RATES.items() if name in kind), float("inf"))
    return max(moved / run.copied, work / rate) * 1e3


def _decode_rows(run: _Run) -> Iterator[dict]:
    """One token for every row; the state is updated in place."""
    options = run.options
    B, R, d = options.decode, DECODE_HEADS, options.dim
    k, v = (jax.random.normal(jax.random.key(n), (B, R, d), jnp.bfloat16) for n in (0, 1))
    g = jnp.full((B, R), -0.1)
    moved = 2 * 4 * B * R * d * d + 4 * k.nbytes + 2 * g.nbytes
    for name in (n for n in api.STEPS if n in ("reference", *options.implementations)):
        row = {"what": "decode", "implementation": name, "dims": (B, R, d)}
        held = {"state": jnp.zeros((B, R, d, d))}
        step = functools.partial(api.gated_delta_step, implementation=name)
        step = jax.jit(step, donate_argnums=5)

        def call(step=step, held=held):
            o, held["state"] = step(k, k, v, g, -g, held["state"])
            return o

        times, failed = interleaved({name: Program(call)}, options.repeats, options.seconds)
        if failed:
            yield row | {"error": failed[name]}
            continue
        rate = moved / (times[name]["ms"] / 1e3)
        share = round(rate / run.copied, 4)
        yield row | times[name] | {"gbps": round(rate / 1e9, 1), "share_of_copy": share}


def _copy_rate(options: Options) -> float:
    """Of adding 1 to an array as large as the decode state."""
    x = jnp.zeros((options.decode, DECODE_HEADS, options.dim, options.dim), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    times, _ = interleaved({"copy": Program(lambda: add(x))}, options.repeats, options.seconds)
    return 2 * x.nbytes / (times["copy"]["ms"] / 1e3)


def _load_peers(options: Options) -> tuple[dict[str, peers.Peer], dict[str, str]]:
    loaded, refused = {}, {}
    for name in options.implementations:
        if name in peers.PEERS:
            try:
                loaded[name] = peers.load(name)
            except Exception as error:  # whatever its import raises is the reason
                refused[name] = describe(error)
    return loaded, refused


def summary(rows: list[dict], subject: str = "mosaic_gpu") -> dict[str, float]:
    """Of each shape the slower gate. `vs` is our time by the peer's, below 1 we are faster;
    `speedup_vs_xla` is the other way round."""
    found: dict[str, float] = {}

    def keep(name, value, worse):
        found[name] = worse(found.get(name, value), value)

    timed = [row for row in rows if row["what"] == "time" and "gates" in row]
    ours = {(r["shape"], r["gates"]): r for r in timed if r["implementation"] == subject}
    for (shape, _), row in ours.items():
        for what in (w for w in WHATS if f"{w}_ms" in row):
            keep(f"{what}_ms_{shape}", row[f"{what}_ms"], max)
            keep(f"{what}_floor_share_{shape}", row[f"{what}_floor_share"], min)
    for row in timed:
        name, shape = row["implementation"], row["shape"]
        mine = ours.get((shape, row["gates"]))
        if mine is None or name == subject:
            continue
        both = [what for what in ("fwd", "fwdbwd") if f"{what}_ms" in row and f"{what}_ms" in mine]
        ratios = {what: mine[f"{what}_ms"] / row[f"{what}_ms"] for what in both}
        for what, ratio in ratios.items():
            keep(f"{what}_vs_{name}_{shape}", round(ratio, 3), max)
        if name == "xla" and ratios:
            keep(f"speedup_vs_xla_{shape}", round(1 / max(ratios.values()), 2), min)
    for row in rows:
        if row["what"] == "error" and row.get("implementation") == subject and "errors" in row:
            worst = max(row["errors"].values())
            keep("max_rel_err", worst, max)
            keep(f"max_rel_err_{row['inputs']}", worst, max)
        if row["what"] == "decode" and "share_of_copy" in row:
            name = row["implementation"]
            name = "decode_step" if name == subject else f"decode_step_{name}"
            keep(f"{name}_bandwidth_share", row["share_of_copy"], max)
    return found
