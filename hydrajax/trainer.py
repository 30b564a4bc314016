"""One optimiser step for every stage: micro-batches, gradients of sum / count, guarded update."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.tree_util import register_dataclass

from hydrajax.config import RunConfig
from hydrajax.model import bind
from hydrajax.stages import STAGES
from hydrajax.typing import Array, Params


@dataclass(frozen=True)
class TrainState:
    """Everything a checkpoint needs beside the position in the data."""

    step: Array
    params: Params  # fp32 masters, trained or not
    opt_state: optax.OptState  # of the trained ones only


register_dataclass(TrainState, ["step", "params", "opt_state"], [])


@dataclass(frozen=True)
class Programs:
    """Static structure of a run: graphs, the stage and its optimiser."""

    student: nnx.GraphDef
    teacher: nnx.GraphDef | None
    run: RunConfig
    tx: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule  # for the log: what `tx` applies at a step

    def trainable(self, params: Params) -> Params:
        trains = STAGES[self.run.stage].trains
        return {path: p for path, p in params.items() if trains(path, self.run.train)}


def make_loss(programs: Programs):
    """`loss(trained, frozen, teacher_params, batch) -> (sum, (count, metrics))` of the stage."""
    stage, cfg = STAGES[programs.run.stage], programs.run.train

    def loss(trained: Params, frozen: Params, teacher_params: Params, batch):
        student = bind(programs.student, frozen | trained)
        teacher = bind(programs.teacher, teacher_params) if programs.teacher is not None else None
        total, count, metrics = stage.loss(student, teacher, batch, cfg)
        return total, (count, metrics)

    return loss


def make_train_step(programs: Programs):
    """`step(state, teacher_params, batch) -> (state, metrics)`; jit it, donating the state.

    A step whose loss or gradient is not finite leaves parameters and moments as they were and
    reports `nonfinite = 1`; what to do about it is the loop's choice.
    """
    cfg, loss = programs.run.train, make_loss(programs)

    def step(state: TrainState, teacher_params: Params, batch: dict[str, Array]):
        trained = programs.trainable(state.params)
        frozen = {path: p for path, p in state.params.items() if path not in trained}

        def sums_of(rows):
            (total, (count, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
                trained, frozen, teacher_params, rows
            )
            return total, grads, count, metrics

        first, rest = _split_rows(batch, cfg.accum)
        sums = sums_of(first)
        if cfg.accum > 1:
            add = lambda total, rows: (jax.tree.map(jnp.add, total, sums_of(rows)), None)  # noqa: E731
            sums, _ = jax.lax.scan(add, sums, rest)
        total, grads, count, metrics = sums
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), grads)

        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        updates, opt_state = programs.tx.update(grads, state.opt_state, trained, finite=finite)
        trained = jax.tree.map(keep, optax.apply_updates(trained, updates), trained)
        metrics |= {"grad_norm": (norm, 1.0), "nonfinite": (1.0 - finite, 1.0)}
        return TrainState(state.step + 1, frozen | trained, opt_state), metrics

    return step


def jit_train_step(programs: Programs, places: TrainState):
    """The step compiled, its state donated.

    Shardings are pinned: were the compiler free to choose, the second step would compile again.
    """
    return jax.jit(
        make_train_step(programs),
        donate_argnames=("state",),
        out_shardings=(places, None),
        compiler_options=_options(programs, places),
    )


def _options(programs: Programs, places: TrainState) -> dict[str, bool | int]:
    """What XLA for GPUs must be told where moments or inputs of blocks come from host memory.

    Its scheduler that hides what copies take begins the layers of a backward pass all at once, and
    memory does not suffice. Its own rematerialisation counts host memory as the device's, computes
    much again and frees nothing: its limit is put out of reach.
    """
    gpu = all(device.platform == "gpu" for device in places.step.device_set)
    optim, remat = programs.run.optim, programs.run.train.remat
    options = {}
    if gpu and (optim.offload or remat == "host"):
        options |= {"xla_gpu_enable_latency_hiding_scheduler": False}
    if gpu and remat == "host":
        options |= {"xla_gpu_memory_limit_slop_factor": 1000}  # percent
    return options


def make_eval_step(programs: Programs):
    """`evaluate(params, teacher_params, batch) -> metrics`: the stage's loss without gradients."""
    stage, cfg = STAGES[programs.run.stage], programs.run.train

    def evaluate(params: Params, teacher_params: Params, batch: dict[str, Array]):
        student = bind(programs.student, params)
        teacher = bind(programs.teacher, teacher_params) if programs.teacher is not None else None
        return stage.loss(student, teacher, batch, cfg)[2]

    return evaluate


def _split_rows(batch: dict[str, Array], accum: int) -> tuple[dict, dict]:
    """First micro-batch, and the others stacked for a scan. Rows are dealt in strides, so that
    every micro-batch holds rows of every device."""
    dealt = {k: v.reshape(v.shape[0] // accum, accum, *v.shape[1:]) for k, v in batch.items()}
    rest = {k: jnp.moveaxis(v[:, 1:], 1, 0) for k, v in dealt.items()}
    return {k: v[:, 0] for k, v in dealt.items()}, rest


def means(collected: list[dict[str, tuple[Array, Array]]]) -> dict[str, float]:
    """Host side: sums over steps divided once; `nonfinite` stays a count."""
    host = jax.device_get(collected)
    out = {}
    for name in host[0]:
        total, count = (sum(float(m[name][i]) for m in host) for i in (0, 1))
        out[name] = total if name == "nonfinite" else total / max(count, 1e-30)
    return out
