"""Where every array of a run lives: shapes and shardings of a stage on a mesh, before any exists.

`train.py` fills a layout with weights, `hydrajax.rehearse` compiles it as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hydrajax.checkpoint import Run
from hydrajax.config import HydraConfig, KernelConfig, ModelConfig, RunConfig
from hydrajax.data.top_k import fields
from hydrajax.head_plan import HeadPlan
from hydrajax.model import abstract_model, load_model, logical_axes, split_params
from hydrajax.optim import make_optimizer, schedule, state_shardings
from hydrajax.sharding import (
    batch_sharding,
    check_batch,
    device_kind,
    in_host_memory,
    param_shardings,
    replicated,
)
from hydrajax.stages import STAGES
from hydrajax.trainer import Programs, TrainState
from hydrajax.typing import Params


class Design(Protocol):
    """What decides the shapes of a model; a `Start` or a `RunInfo` will do."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def hydra(self) -> HydraConfig: ...
    @property
    def plan(self) -> HeadPlan: ...


@dataclass(frozen=True)
class Placed:
    """A model's structure, and its parameters as shapes that know their shardings."""

    graphdef: nnx.GraphDef
    params: dict[str, jax.ShapeDtypeStruct]
    whole: tuple[str, ...] = ()  # paths whose heads do not divide mesh.model

    @property
    def shardings(self) -> dict[str, NamedSharding]:
        return {path: a.sharding for path, a in self.params.items()}


@dataclass(frozen=True)
class Layout:
    """A stage on a mesh: its programs, and shape and place of all that they read and write."""

    programs: Programs
    student: Placed  # fp32 masters
    teacher: Placed | None  # in the compute dtype
    places: TrainState  # sharding of every leaf of the state
    mesh: Mesh

    @property
    def device_kind(self) -> str:
        return device_kind(self.mesh)

    def state(self) -> TrainState:
        """The training state, abstract."""
        opt_state = jax.eval_shape(self.programs.tx.init, self.trained())
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.places.step)
        return TrainState(step, self.student.params, _with(opt_state, self.places.opt_state))

    def trained(self) -> Params:
        """Parameters that the stage trains, abstract."""
        return self.programs.trainable(self.student.params)

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """One step's rows of all processes, abstract; UserError if they cannot be split."""
        data = self.programs.run.data
        check_batch(self.mesh, data.rows, data.seq_len, self.programs.run.train.accum)
        shape, sharding = (data.rows, data.seq_len), batch_sharding(self.mesh)
        ids = dict.fromkeys(("tokens", "segment_ids", "positions"), ((), jnp.int32))
        known = ids | {"loss_mask": ((), jnp.float32)}
        cached = fields(self.programs.run.train.teacher_cache)
        return {
            name: jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=sharding)
            for name, (more, dtype) in (known | cached).items()
        }


def lay_out(cfg: RunConfig, mesh: Mesh, student: Design, teacher: Callable[[], Design]) -> Layout:
    """Lay a stage out on a mesh; `teacher` is asked only where the stage needs one."""
    dtype = jnp.dtype(cfg.train.compute_dtype)
    if cfg.train.remat == "host":
        in_host_memory(NamedSharding(mesh, P()), "train.remat=host")  # XLA's error names no knob
    placed = place(
        student, cfg.stage, mesh, dtype=dtype, remat=cfg.train.remat, kernels=cfg.kernels
    )
    frozen = None
    if STAGES[cfg.stage].needs_teacher(cfg.train):
        frozen = place_teacher(cfg, mesh, teacher())
    programs = Programs(
        placed.graphdef,
        None if frozen is None else frozen.graphdef,
        cfg,
        tx=make_optimizer(cfg.optim, cfg.train.steps),
        learning_rate=schedule(cfg.optim, cfg.train.steps),
    )
    moments = state_shardings(
        programs.tx,
        programs.trainable(placed.params),
        placed.shardings,
        mesh,
        offload=cfg.optim.offload,
    )
    places = TrainState(NamedSharding(mesh, P()), placed.shardings, moments)
    return Layout(programs, placed, frozen, places, mesh)


def place(design: Design, stage: str, mesh: Mesh, *, kernels: KernelConfig, **options) -> Placed:
    """A model as a stage runs it, its parameters placed by the rules of `sharding`."""
    model = abstract_model(
        design.model, design.hydra.for_stage(stage), design.plan, kernels=kernels, **options
    )
    graphdef, abstract = split_params(model)
    axes, shapes = logical_axes(model), {path: a.shape for path, a in abstract.items()}
    shardings = param_shardings(mesh, axes, shapes)
    return Placed(graphdef, _with(abstract, shardings), tuple(replicated(mesh, axes, shapes)))


def place_teacher(cfg: RunConfig, mesh: Mesh, teacher: Design) -> Placed:
    """The frozen teacher of a run, its parameters in the compute dtype."""
    dtype = jnp.dtype(cfg.train.compute_dtype)
    frozen = place(teacher, "", mesh, dtype=dtype, kernels=cfg.kernels)
    params = {
        path: jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding)
        for path, a in frozen.params.items()
    }
    return Placed(frozen.graphdef, params)


def fill(placed: Placed, run: Run) -> Params:
    """A loaded run's parameters where and in what dtype they were placed."""
    _, params = load_model(run)  # refuses parameters that are not this model's
    return {
        path: jax.device_put(jnp.asarray(params[path]).astype(a.dtype), a.sharding)
        for path, a in placed.params.items()
    }


def head_split(plan: HeadPlan, mesh: Mesh) -> str:
    """What `mesh.model` splits, in one line, and the most heads of a device against an even split.

    A layer's FA and GDN heads are split apart. Where their number does not divide, every device
    computes all of them: parameters keep the shapes of checkpoints, and no head is padded.
    """
    size = mesh.shape["model"]
    if size == 1:
        return ""
    parts = []
    for kind in ("fa", "la"):
        heads = [len(getattr(plan.layer(l), kind)) for l in range(plan.num_layers)]
        heads = [n for n in heads if n]
        if heads:
            held = sum(n if n % size else n // size for n in heads)
            split = sum(n % size == 0 for n in heads)
            name = {"fa": "FA", "la": "GDN"}[kind]
            parts.append(
                f"{name} heads in {split} of {len(heads)} layers "
                f"({held * size / sum(heads):.2f} x an even split)"
            )
    return f"mesh.model={size} splits {', '.join(parts)}; other layers' are whole on every device"


def _with(tree, shardings):
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )
