"""The real train step of a run, compiled for a named TPU topology that is not there.

Nothing runs and no array is made: shapes with shardings go in, an executable comes out. The
teacher's shapes come from its folder, else from config.model; the head plan from the parent run or
config.heads, else it is drawn as `select.scorer=random` would draw it.
"""

import os
import re
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from hydrajax.config import HydraConfig, ModelConfig, RunConfig
from hydrajax.head_plan import HeadPlan, load_plan
from hydrajax.layout import Layout, lay_out
from hydrajax.rehearse import memory as hbm
from hydrajax.rehearse.chips import chip_of
from hydrajax.rehearse.hlo import Program
from hydrajax.run_folder import read_config
from hydrajax.selection import budget
from hydrajax.sharding import make_mesh
from hydrajax.trainer import jit_train_step
from hydrajax.typing import UserError

# libtpu otherwise asks for the machine it believes to be on, and lets one process load it.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
OPS = ("gated_delta_rule", "attention", "causal_conv")


@dataclass(frozen=True)
class Subject:
    """Model, hydra flags and head plan of one side."""

    model: ModelConfig
    hydra: HydraConfig
    plan: HeadPlan
    source: str  # where the plan comes from


@dataclass(frozen=True)
class Compiled:
    """A compiled step, or how much it asked for when it did not fit."""

    memory: hbm.Memory
    text: str | None  # of the executable; None when it did not fit
    seconds: dict[str, float]  # count, trace, lower, compile


def devices_of(topology: str) -> list:
    """Devices of a topology such as "v5e:16x16", none of which is at hand."""
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as e:
        reason = " ".join(str(e).split())
        raise UserError(
            f"topology {topology!r}: {reason}. It is a chip and its grid, such as v5e:2x2, "
            "v5p:8x8x16, v6e:16x16 or tpu7x:2x2x1, and needs libtpu (pip install 'jax[tpu]')."
        ) from e


def subjects(cfg: RunConfig) -> tuple[Subject, Subject]:
    """(student, teacher) from what folders there are, else from the config alone."""
    if cfg.teacher and (Path(cfg.teacher) / "config.json").is_file():
        info = read_config(cfg.teacher)
        teacher = Subject(info.model, info.hydra, info.plan, cfg.teacher)
    elif cfg.model is not None:
        m = cfg.model
        full = HeadPlan.all_full(m.num_layers, m.num_heads, m.num_kv_heads)
        teacher = Subject(m, HydraConfig.teacher(), full, "config.model")
    else:
        raise UserError(
            f"A rehearsal needs the teacher's shapes: neither config.model nor a config.json in "
            f"config.teacher={cfg.teacher!r} is there."
        )
    if cfg.stage == "pretrain":
        return teacher, teacher
    if cfg.parent and (Path(cfg.parent) / "config.json").is_file():
        info = read_config(cfg.parent)
        return Subject(info.model, info.hydra, info.plan, cfg.parent), teacher
    if cfg.heads and Path(cfg.heads).is_file():
        return Subject(teacher.model, cfg.hydra, load_plan(cfg.heads), cfg.heads), teacher
    return Subject(teacher.model, cfg.hydra, drawn_plan(cfg, teacher.model), "drawn"), teacher


def drawn_plan(cfg: RunConfig, model: ModelConfig) -> HeadPlan:
    """A plan of the config's budget, its heads drawn: shapes like those a selection would give."""
    shape = model.num_layers, model.num_heads
    order = np.random.default_rng(cfg.select.seed).permutation(shape[0] * shape[1])
    return budget.make_plan([order.reshape(shape)], cfg.select, model)


def lay_out_on(cfg: RunConfig, devices: list) -> tuple[Layout, Subject]:
    """The run on a mesh of these devices, and its student."""
    student, teacher = subjects(cfg)
    return lay_out(cfg, make_mesh(cfg.mesh, devices), student, lambda: teacher), student


def compile_step(layout: Layout) -> Compiled:
    """Compile the step as `train.py` would on this mesh, unless its state alone is too large."""
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def took(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[what], began = round(now - began, 1), now

    chip = chip_of(layout.device_kind)
    memory = hbm.count(layout)
    took("count")
    if memory.state > chip.hbm:
        least = memory.state + memory.rows + memory.activations
        return Compiled(replace(memory, total=least, hbm=round(chip.hbm)), None, seconds)
    step = jit_train_step(layout.programs, layout.places)
    teacher = layout.teacher.params if layout.teacher else {}
    with jax.set_mesh(layout.mesh):
        traced = step.trace(layout.state(), teacher, layout.batch())
        took("trace")
        lowered = traced.lower()
        took("lower")
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            sizes = hbm.overflow(str(e))
            if sizes is None:
                raise
            took("compile")
            return Compiled(replace(memory, total=sizes[0], hbm=sizes[1]), None, seconds)
    took("compile")
    total = hbm.compiled_total(executable.memory_analysis())
    chip = chip_of(layout.device_kind)
    return Compiled(
        replace(memory, total=total, hbm=round(chip.hbm)), executable.as_text(), seconds
    )


def implementations(program: Program) -> dict[str, list[str]]:
    """Which implementation of each op the executable holds, by the scopes of its instructions."""
    found = defaultdict(set)
    scope = re.compile(rf"\b({'|'.join(OPS)})=(\w+)")
    for instructions in program.computations.values():
        for i in instructions:
            for op, name in scope.findall(i.attributes):
                found[op].add(name)
    return {op: sorted(names) for op, names in sorted(found.items())}
