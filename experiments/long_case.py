"""One case of `experiments.long_context`: the real train step at one length on one device.

    python -m experiments.long_case --shape=student --tokens=262144 --target=tests/h100.txtpb

With `--target` the step is compiled for a GPU that is not there and its memory printed; without, it
runs on the first device: a step that is not timed, then some that are. `--save` compiles it for
that device into a file, from which `--program` takes it. Weights are drawn on the device, tokens
too; a row is one document, or `--documents` of one length.

    student         the config's hydra flags, its share of heads full attention, drawn
    teacher_shape   every head full attention, no gates: the teacher, trained by the same optimiser
"""

import argparse
import ast
import importlib
import json
import pickle
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from hydrajax.config import MeshConfig, RunConfig
from hydrajax.flops import mfu, train_flops_per_token
from hydrajax.layout import Layout, lay_out
from hydrajax.manifest import write_atomic
from hydrajax.model import init_params
from hydrajax.rehearse.memory import compiled_total
from hydrajax.rehearse.step import OPS, Subject, subjects
from hydrajax.sharding import device_kind, make_mesh
from hydrajax.stages import STAGES
from hydrajax.trainer import TrainState, jit_train_step, means
from hydrajax.typing import UserError

SHAPES = ("student", "teacher_shape")
OWN = ("data.seq_len", "data.rows", "train.accum", "parent", "teacher")  # keys that a case sets
CONFIG = "configs/qwen3_1p7b/extend.py"
ENOUGH_S = 20.0  # so long a step needs no step before it that warms up

_ASKED = re.compile(r"(?:allocat\w*|request for)[^\d\n]{0,40}?([\d.]+) ?([KMGT]?i?B\b|bytes)")
_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Case:
    """What is trained: shape, tokens of its one row, and how long it may be timed."""

    shape: str
    tokens: int
    documents: int = 1
    steps: int = 3  # timed
    seconds: float = 1e9  # of the timed steps: none is begun after that


def read_config(path: str, case: Case, changes: list[str]) -> RunConfig:
    """The config with one row of the case's length and no accumulation, and `key=value` changes."""
    path, _, argument = path.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = module.get_config(argument or None)
    config.select.scorer, config.select.alloc = "random", "global_c"
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or key in OWN or key.startswith("mesh."):
            raise UserError(f"{change!r}: expected key=value, the key none of {OWN} and mesh.*")
        config.update_from_flattened_dict({key: _value(text)})
    config.data.seq_len, config.data.rows, config.train.accum = case.tokens, 1, 1
    cfg = replace(RunConfig.from_dict(config), mesh=MeshConfig(), parent="", teacher="")
    if STAGES[cfg.stage].needs_teacher(cfg.train):
        raise UserError(f"{path}: expected a stage without a teacher, got {cfg.stage} with one")
    return cfg


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def lay_out_case(cfg: RunConfig, case: Case, devices: list) -> tuple[Layout, Subject]:
    """The stage of one shape on one device; weights need no folder."""
    student, teacher = subjects(cfg)
    subject = student if case.shape == "student" else teacher
    return lay_out(cfg, make_mesh(cfg.mesh, devices[:1]), subject, lambda: teacher), subject


def target_devices(path: Path) -> list:
    """One GPU of a target description of XLA, to compile for; needs jax's CUDA plugin, no GPU."""
    return list(
        topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=path.read_text(), topology="1x1x1"
        ).devices
    )


def facts(cfg: RunConfig, case: Case, layout: Layout, subject: Subject) -> dict[str, Any]:
    """What is known before anything is compiled."""
    stage = cfg.stage if case.shape == "student" else "pretrain"  # which counts no gates
    return {
        "shape": case.shape,
        "tokens": case.tokens,
        "documents": case.documents,
        "stage": cfg.stage,
        "parameters": sum(a.size for a in layout.student.params.values()),
        "trained": sum(a.size for a in layout.trained().values()),
        "fa_heads": [len(heads) for heads in subject.plan.fa],
        "heads": subject.plan.num_heads,
        "plan": subject.source,
        "remat": cfg.train.remat,
        "compute_dtype": cfg.train.compute_dtype,
        "loss_chunk": cfg.train.loss_chunk,
        "device_kind": layout.device_kind,
        "flops_per_token": train_flops_per_token(
            subject.model, subject.plan, case.tokens // case.documents, stage
        ),
    }


def compile_case(layout: Layout) -> tuple[Any, dict[str, Any]]:
    """The executable, and how long it took, what it holds and what memory it asks for."""
    seconds, began = {}, time.perf_counter()

    def took(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[what], began = round(now - began, 1), now

    with jax.set_mesh(layout.mesh):
        step = jit_train_step(layout.programs, layout.places)
        traced = step.trace(layout.state(), {}, layout.batch())
        took("trace")
        lowered = traced.lower()
        took("lower")
        compiled = lowered.compile()
        took("compile")
    sizes = compiled.memory_analysis()
    return compiled, {
        "seconds": seconds,
        "compiled_bytes": compiled_total(sizes),
        "temporary_bytes": sizes.temp_size_in_bytes,
        "implementations": implementations(compiled.as_text() or ""),
    }


def implementations(text: str) -> dict[str, list[str]]:
    """Which implementation of each op an executable holds, by the scopes of its instructions."""
    found = set(re.findall(rf"\b({'|'.join(OPS)})=(\w+)", text))
    return {op: sorted(name for o, name in found if o == op) for op, _ in sorted(found)}


def save_program(layout: Layout, path: Path) -> dict[str, Any]:
    """Compiles into a file that `load_program` takes, and says the same of it."""
    compiled, found = compile_case(layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, pickle.dumps((serialize(compiled), found)))
    return found


def load_program(path: Path) -> tuple[Any, dict[str, Any]]:
    """What `compile_case` gave the process that saved it, without its minutes."""
    from jax.experimental.pallas import mosaic_gpu  # noqa: F401  tells XLA where its runtime lies

    program, found = pickle.loads(path.read_bytes())
    return deserialize_and_load(*program, execution_devices=jax.devices()[:1]), found


def draw_state(layout: Layout, subject: Subject) -> TrainState:
    """Random weights and empty moments."""
    cfg = layout.programs.run
    _, params = init_params(
        subject.model, subject.hydra.for_stage(cfg.stage), subject.plan, cfg.seed
    )
    params = jax.device_put(params, layout.places.params)
    init = jax.jit(layout.programs.tx.init, out_shardings=layout.places.opt_state)
    step = jax.device_put(jnp.zeros((), jnp.int32), layout.places.step)
    return TrainState(step, params, init(layout.programs.trainable(params)))


def make_batch(cfg: RunConfig, case: Case, vocabulary: int, layout: Layout) -> dict[str, jax.Array]:
    """One row of drawn tokens, of documents of one length; the last one takes what is left."""
    at = np.arange(case.tokens)
    length = case.tokens // case.documents
    document = np.minimum(at // length, case.documents - 1)
    tokens = np.random.default_rng(cfg.data.seed).integers(vocabulary, size=case.tokens)
    row = {
        "tokens": tokens,
        "segment_ids": document + 1,
        "positions": at - document * length,
        "loss_mask": np.ones(case.tokens),
    }
    return {
        name: jax.device_put(row[name][None].astype(a.dtype), a.sharding)
        for name, a in layout.batch().items()
    }


def time_steps(
    step: Callable[[TrainState], tuple[TrainState, dict]], state: TrainState, case: Case
) -> dict[str, Any]:
    """Seconds of a first step and of those after it, and what the first one found.

    A first step that is long is a timed one: what it does once is little beside it.
    """
    readings, metrics, begin = [], None, time.perf_counter()
    while len(readings) <= case.steps:
        late = time.perf_counter() - begin > case.seconds
        if late and (len(readings) > 1 or readings[0] >= ENOUGH_S):
            break
        at = time.perf_counter()
        state, found = jax.block_until_ready(step(state))
        readings.append(time.perf_counter() - at)
        metrics = metrics or found
    warm = readings[1:] or readings[:1]
    named = {name: value for name, value in means([metrics]).items() if "/" not in name}
    return {
        "first_step_s": round(readings[0], 4),
        "steps_s": [round(x, 4) for x in warm],
        "warmed_up": len(readings) > 1,
        "step_s": statistics.median(warm),
        "metrics_of_first_step": named,
    }


def run(cfg: RunConfig, case: Case, program: Path | None = None) -> dict[str, Any]:
    """The row of a case, of a saved program if any; running out of device memory is a result."""
    device = jax.devices()[0]
    layout, subject = lay_out_case(cfg, case, [device])
    row = facts(cfg, case, layout, subject)
    limit = _memory(device).get("bytes_limit")
    row |= {"bytes_limit": limit} if limit else {}
    try:
        compiled, found = compile_case(layout) if program is None else load_program(program)
        row |= found
        with jax.set_mesh(layout.mesh):
            state = draw_state(layout, subject)
            batch = make_batch(cfg, case, subject.model.vocab_size, layout)
            row |= time_steps(lambda state: compiled(state, {}, batch), state, case)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(str(error)):
            raise
        return row | {"fits": False, "message": str(error)[:500]} | _asked(str(error))
    rate = case.tokens / row["step_s"]
    row |= {"fits": True, "tokens_per_s": rate}
    row |= {"mfu": mfu(rate, row["flops_per_token"], device_kind(layout.mesh))}
    peak = _memory(device).get("peak_bytes_in_use")
    return row | ({"peak_bytes": peak} if peak else {})


def _memory(device) -> dict[str, int]:
    return device.memory_stats() or {}  # None on a CPU


def out_of_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message


def _asked(message: str) -> dict[str, int]:
    asked = asked_bytes(message)
    return {} if asked is None else {"asked_bytes": asked}


def asked_bytes(message: str) -> int | None:
    """Bytes of the allocation that XLA could not make; None where the message does not say."""
    found = _ASKED.search(message)
    return None if found is None else round(float(found[1]) * _UNITS[found[2]])


def ahead(cfg: RunConfig, case: Case, target: Path) -> dict[str, Any]:
    """The row of a case that is compiled alone."""
    layout, subject = lay_out_case(cfg, case, target_devices(target))
    row = facts(cfg, case, layout, subject)
    return row | compile_case(layout)[1] | {"fits": None}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.long_case")
    parser.add_argument("changes", nargs="*", help="key=value of the config")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="timed; 0: only whether it fits")
    parser.add_argument("--seconds", type=float, default=1e9, help="for the steps of this case")
    parser.add_argument("--cache", default="", help="folder of compiled programs")
    parser.add_argument("--target", type=Path, help="compile for this GPU alone")
    parser.add_argument("--save", type=Path, help="compile alone, into this file")
    parser.add_argument("--program", type=Path, help="take it from such a file")
    parser.add_argument("--out", type=Path, help="JSON file for the row")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.target is not None:
        jax.config.update("jax_platforms", "cpu")
    if args.cache and args.save is None:  # what was read from a cache cannot always be saved
        jax.config.update("jax_compilation_cache_dir", args.cache)
    case = Case(args.shape, args.tokens, args.documents, args.steps, args.seconds)
    cfg = read_config(args.config, case, args.changes)
    if args.target is not None:
        row = ahead(cfg, case, args.target)
    elif args.save is not None:
        row = save_program(lay_out_case(cfg, case, jax.devices())[0], args.save)
    else:
        row = run(cfg, case, args.program)
    text = json.dumps(row, indent=1)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, (text + "\n").encode())


if __name__ == "__main__":
    main()
