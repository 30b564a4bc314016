"""HBM of one device: what a step keeps there, and which knob to turn when it is too much.

State, teacher and rows are counted from shapes and shardings. `activations` is what the forward
pass keeps for the backward pass, found by tracing the loss on one device's tokens; with mesh.model
> 1 it is an upper bound, since heads and MLP widths are then split further, and with mesh.context >
1 it lacks what a device keeps of the others' tokens, their keys and state maps. The total is the
compiler's, and `other` is what it needs beside: gradients, working space, code. What lies in host
memory is `host` and part of nothing else.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hydrajax.config import RunConfig
from hydrajax.layout import Layout
from hydrajax.model import bind
from hydrajax.rehearse.chips import GIB
from hydrajax.sharding import HOST
from hydrajax.trainer import make_loss
from hydrajax.typing import Params


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, and those in host memory for it."""

    parameters: int  # fp32 masters
    optimiser: int
    teacher: int
    rows: int  # of the batch
    gradients: int  # of the trained parameters, fp32: a part of `other`
    activations: int
    total: int | None = None  # the compiler's; where the state alone is too large, the least
    hbm: int | None = None  # the compiler's where it refuses, else that of the table
    inputs: int = 0  # of blocks: among `activations`, with train.remat=host in host memory instead
    host: int = 0  # moments under optim.offload

    @property
    def state(self) -> int:
        """What stays between steps, and the gradients that must stand beside it."""
        return self.parameters + self.optimiser + self.teacher + self.gradients

    @property
    def other(self) -> int | None:
        """What the compiler uses beside all that is named."""
        if self.total is None:
            return None
        named = self.parameters + self.optimiser + self.teacher + self.rows
        return self.total - named - self.activations

    def facts(self) -> dict[str, int | None]:
        """For the result file."""
        return asdict(self) | {"other": self.other}


def count(layout: Layout) -> Memory:
    """All but the compiler's part."""
    state = layout.state()
    opt_state = jax.tree.leaves(state.opt_state)
    offloaded = [a for a in opt_state if a.sharding.memory_kind == HOST]
    return Memory(
        parameters=_on_device(state.params),
        optimiser=_on_device(opt_state) - _on_device(offloaded),
        host=_on_device(offloaded),
        teacher=_on_device(layout.teacher.params) if layout.teacher else 0,
        rows=_on_device(layout.batch()),
        gradients=_on_device(layout.trained()),
        activations=activations(layout),
        inputs=inputs_of_blocks(layout),
    )


def inputs_of_blocks(layout: Layout) -> int:
    """Bytes of one micro-batch's on one device."""
    cfg = bind(layout.student.graphdef, layout.student.params).cfg
    dtype = jnp.dtype(layout.programs.run.train.compute_dtype)
    return cfg.num_layers * math.prod(_micro_batch(layout)) * cfg.width * dtype.itemsize


def _micro_batch(layout: Layout) -> tuple[int, int]:
    """Rows and tokens of one on one device."""
    cfg, mesh = layout.programs.run, layout.mesh
    rows = cfg.data.rows // cfg.train.accum // (mesh.shape["data"] * mesh.shape["fsdp"])
    return rows, cfg.data.seq_len // mesh.shape["context"]


def activations(layout: Layout) -> int:
    """Bytes that one micro-batch's forward pass keeps for its backward pass on one device.

    They are the residuals that depend on the batch and are not of a parameter's shape: the others
    are parameters, counted already, and gradients of the unembedding, which the losses take early.
    """
    mesh, rows_and_tokens = layout.mesh, _micro_batch(layout)
    batch = {
        name: jax.ShapeDtypeStruct((*rows_and_tokens, *a.shape[2:]), a.dtype)
        for name, a in layout.batch().items()
    }
    student, trained = _shapes(layout.student.params), _shapes(layout.trained())
    frozen = {path: a for path, a in student.items() if path not in trained}
    teacher = _shapes(layout.teacher.params) if layout.teacher else {}
    loss = make_loss(layout.programs)

    def residuals(batch, trained, frozen, teacher):
        _, backward, _ = jax.vjp(
            lambda trained: loss(trained, frozen, teacher, batch), trained, has_aux=True
        )
        return backward

    one = Mesh(mesh.devices.reshape(-1)[:1].reshape((1,) * mesh.devices.ndim), mesh.axis_names)
    with jax.set_mesh(one):
        jaxpr = jax.make_jaxpr(residuals)(batch, trained, frozen, teacher).jaxpr
    weights = {a.shape for a in (*student.values(), *teacher.values())}
    kept = (
        var.aval
        for var in _kept(jaxpr, len(batch))
        if var.aval.shape not in weights and var.aval.memory_space != jax.memory.Space.Host
    )
    return sum(a.size * a.dtype.itemsize for a in kept)


def _shapes(params: Params) -> Params:
    return {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in params.items()}


def _kept(jaxpr, inputs: int) -> set:
    """Outputs that depend on the first `inputs` inputs."""
    moved = set(jaxpr.invars[:inputs])
    given = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in moved for v in equation.invars):
            moved.update(equation.outvars)
    return {v for v in jaxpr.outvars if not hasattr(v, "val") and v in moved and v not in given}


def _on_device(tree) -> int:
    return sum(
        jnp.dtype(a.dtype).itemsize * math.prod(a.sharding.shard_shape(a.shape))
        for a in jax.tree.leaves(tree)
    )


def compiled_total(stats) -> int:
    """Bytes of a compiled program on one device, at most at one time."""
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )


_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", re.IGNORECASE)
_NEEDS = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def overflow(message: str) -> tuple[int, int] | None:
    """(needed, available) bytes of a compiler's refusal; None when it is about something else."""
    found = _USED.search(message) or _NEEDS.search(message)
    if found is None:
        return None
    need, need_unit, have, have_unit = found.groups()
    return int(float(need) * _UNITS[need_unit]), int(float(have) * _UNITS[have_unit])


def refusal(cfg: RunConfig, mesh: dict[str, int], memory: Memory) -> str:
    """What does not fit, by how much, and what to set to what."""
    parts = ", ".join(
        f"{name} {value / GIB:.2f}"
        for name, value in memory.facts().items()
        if name not in ("total", "hbm", "other", "host", "inputs") and value >= GIB / 200
    )
    least = "at least " if memory.state > memory.hbm else ""  # then it was not compiled
    knobs = "; or ".join((*advice(cfg, mesh, memory), "take a topology with more devices"))
    return (
        f"does not fit: a device needs {least}{memory.total / GIB:.2f} GiB, its HBM has "
        f"{memory.hbm / GIB:.2f} GiB ({parts}). To do: {knobs}."
    )


def advice(cfg: RunConfig, mesh: dict[str, int], memory: Memory) -> Iterator[str]:
    """Knobs with the values to try, those first that cost least."""
    split = mesh["data"] * mesh["fsdp"]
    if mesh["data"] > 1:
        yield (
            f"split parameters and moments over more devices, --config.mesh.data=1 "
            f"--config.mesh.fsdp={split} (now {mesh['data']} and {mesh['fsdp']})"
        )
    offload = "keep the moments in host memory, --config.optim.offload=True (now False)"
    too_much = memory.state if memory.state > memory.hbm else memory.total
    helps = not cfg.optim.offload and too_much - memory.optimiser <= memory.hbm
    if memory.state > memory.hbm:  # rows and activations are not what is too much
        if helps:
            yield offload
        return
    rows = cfg.data.rows // cfg.train.accum // split
    if rows > 1:
        ratio = (memory.total - memory.state) / max(memory.hbm - memory.state, 1)
        more = _accum(cfg, split, ratio)
        yield f"smaller micro-batches, --config.train.accum={more} (now {cfg.train.accum})"
    if cfg.train.remat in ("none", "dots"):
        yield f"keep less for the backward pass, --config.train.remat=block (now {cfg.train.remat})"
    now = cfg.train.loss_chunk
    less = min(now, max(rows, 1) * cfg.data.seq_len // mesh["context"]) // 2
    if less > 0:
        yield f"fewer logits at a time, --config.train.loss_chunk={less} (now {now})"
    if helps:
        yield offload
    if cfg.train.remat == "block" and memory.total - memory.inputs <= memory.hbm:
        yield "keep inputs of blocks in host memory, --config.train.remat=host (now block)"
    if rows <= 1:
        length = cfg.data.seq_len
        yield f"shorter rows, --config.data.seq_len={length // 2} (now {length})"


def _accum(cfg: RunConfig, split: int, ratio: float) -> int:
    """The least accumulation that makes micro-batches smaller by `ratio`, or else the most."""
    possible = [
        accum
        for accum in range(cfg.train.accum + 1, cfg.data.rows // split + 1)
        if cfg.data.rows % accum == 0 and cfg.data.rows // accum % split == 0
    ]
    enough = (accum for accum in possible if accum >= ratio * cfg.train.accum)
    return next(enough, possible[-1])
