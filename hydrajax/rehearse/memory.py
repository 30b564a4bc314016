"""HBM of one device: what a step keeps there, and which knob to turn when it is too much.

State, teacher and rows are counted from shapes and shardings. `activations` is what the forward
pass keeps for the backward pass, found by tracing the loss on the rows of one device; with
mesh.model > 1 it is an upper bound, since heads and MLP widths are then split further. The total is
the compiler's, and `other` is what it needs beside: gradients, working space, code.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hydrajax.config import RunConfig
from hydrajax.layout import Layout
from hydrajax.rehearse.chips import GIB
from hydrajax.trainer import make_loss


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int  # fp32 masters
    optimiser: int
    teacher: int
    rows: int  # of the batch
    gradients: int  # of the trained parameters, fp32: a part of `other`
    activations: int
    total: int | None = None  # None: the compiler gave up before it knew
    hbm: int | None = None  # as the compiler sees it; None: it had no reason to say

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
    return Memory(
        parameters=_on_device(state.params),
        optimiser=_on_device(state.opt_state),
        teacher=_on_device(layout.teacher.params) if layout.teacher else 0,
        rows=_on_device(layout.batch()),
        gradients=_on_device(layout.trained()),
        activations=activations(layout),
    )


def activations(layout: Layout) -> int:
    """Bytes that one micro-batch's forward pass keeps for its backward pass on one device.

    They are the residuals that depend on the batch; the others are parameters, counted already.
    """
    cfg, mesh = layout.programs.run, layout.mesh
    rows = cfg.data.rows // cfg.train.accum // (mesh.shape["data"] * mesh.shape["fsdp"])
    batch = {
        name: jax.ShapeDtypeStruct((max(rows, 1), a.shape[1]), a.dtype)
        for name, a in layout.batch().items()
    }
    shapes = lambda params: {p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in params.items()}  # noqa: E731
    trained = shapes(layout.trained())
    frozen = {p: a for p, a in shapes(layout.student.params).items() if p not in trained}
    teacher = shapes(layout.teacher.params) if layout.teacher else {}
    loss = make_loss(layout.programs)

    def residuals(batch, trained, frozen, teacher):
        _, backward, _ = jax.vjp(
            lambda trained: loss(trained, frozen, teacher, batch), trained, has_aux=True
        )
        return backward

    one = Mesh(mesh.devices.reshape(-1)[:1].reshape(1, 1, 1), mesh.axis_names)
    with jax.set_mesh(one):
        jaxpr = jax.make_jaxpr(residuals)(batch, trained, frozen, teacher).jaxpr
    return sum(var.aval.size * var.aval.dtype.itemsize for var in _kept(jaxpr, len(batch)))


def _kept(jaxpr, inputs: int) -> set:
    """Outputs that depend on the first `inputs` inputs."""
    moved = set(jaxpr.invars[:inputs])
    given = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(v, "val") and v in moved for v in equation.invars):
            moved.update(equation.outvars)
    return {v for v in jaxpr.outvars if not hasattr(v, "val") and v in moved and v not in given}


def _on_device(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(jnp.dtype(a.dtype).itemsize * _size(a.sharding.shard_shape(a.shape)) for a in leaves)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


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
        if name not in ("total", "hbm") and value
    )
    knobs = list(advice(cfg, mesh, memory))
    last = "; or take a topology with more devices." if knobs else "Take more devices."
    return (
        f"does not fit: a device needs {memory.total / GIB:.2f} GiB of {memory.hbm / GIB:.2f} GiB "
        f"HBM ({parts} GiB). " + "; else ".join(knobs) + last
    )


def advice(cfg: RunConfig, mesh: dict[str, int], memory: Memory) -> Iterator[str]:
    """Knobs in the order in which they cost least, each with the value to try."""
    devices = mesh["data"] * mesh["fsdp"] * mesh["model"]
    if memory.state > memory.hbm:
        fsdp = devices // mesh["model"]
        if fsdp > mesh["fsdp"]:
            yield (
                f"set --config.mesh.fsdp={fsdp} --config.mesh.data=1 (fsdp is {mesh['fsdp']}): "
                "every device keeps a whole copy of what fsdp does not split"
            )
        return
    rows = cfg.data.rows // cfg.train.accum // (mesh["data"] * mesh["fsdp"])
    ratio = (memory.total - memory.state) / max(memory.hbm - memory.state, 1)
    if rows > 1:
        yield f"set --config.train.accum={_accum(cfg, mesh, ratio)} (now {cfg.train.accum})"
    if cfg.train.remat != "block":
        yield f"set --config.train.remat=block (now {cfg.train.remat})"
    pieces = cfg.train.loss_chunk // (mesh["data"] * mesh["fsdp"])
    if pieces > 1:
        yield f"set --config.train.loss_chunk={cfg.train.loss_chunk // 2} (now {cfg.train.loss_chunk})"
    if rows <= 1:
        yield f"set --config.data.seq_len={cfg.data.seq_len // 2} (now {cfg.data.seq_len})"


def _accum(cfg: RunConfig, mesh: dict[str, int], ratio: float) -> int:
    """The least accumulation that makes micro-batches smaller by `ratio`, or else the most."""
    split = mesh["data"] * mesh["fsdp"]
    fitting = [
        a
        for a in range(cfg.train.accum + 1, cfg.data.rows // split + 1)
        if cfg.data.rows % a == 0 and cfg.data.rows // a % split == 0
    ]
    return next((a for a in fitting if a >= ratio * cfg.train.accum), fitting[-1])


def with_total(memory: Memory, total: int, hbm: int) -> Memory:
    return replace(memory, total=total, hbm=hbm)
