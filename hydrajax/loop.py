"""The training loop: batches in, metrics out, checkpoints when due, a clean exit when asked.

Nothing inside talks to the device by accident (`transfer_guard`), metrics are fetched once per
log interval, and every way out either saved or says why it could not.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hydrajax.checkpoint import CheckpointStore
from hydrajax.distributed import Preemption
from hydrajax.metrics import Chrono, MetricWriter, mfu
from hydrajax.sharding import device_kind, place_batch
from hydrajax.trainer import Programs, TrainState, jit_train_step, make_eval_step, means
from hydrajax.typing import UserError

SKIPS_ALLOWED = 3


@dataclass(frozen=True)
class Loop:
    """Everything a run needs beside its state."""

    programs: Programs
    mesh: Mesh
    places: TrainState  # sharding of every leaf of the state
    pipeline: Any  # data.pipeline.Pipeline
    store: CheckpointStore
    writer: MetricWriter
    holdout: list[dict[str, np.ndarray]]
    flops_per_token: float


def run_loop(loop: Loop, state: TrainState, teacher_params: dict) -> TrainState:
    """Train to `train.steps`; returns the last state. SIGTERM saves and returns early."""
    cfg = loop.programs.run.train
    step_fn = jit_train_step(loop.programs, loop.places)
    eval_fn = jax.jit(make_eval_step(loop.programs))
    tokens_per_step = loop.programs.run.data.rows * loop.programs.run.data.seq_len
    chrono, pending, skipped = Chrono(), [], 0
    step = saved = int(state.step)
    profile = Profile(cfg.profile, loop.writer.folder)

    with Preemption() as preemption, contextlib.closing(loop.store):
        while step < cfg.steps:
            with chrono.waiting():
                batch = place_batch(loop.mesh, next(loop.pipeline))
            profile.before(step)
            with jax.transfer_guard("disallow"):
                state, metrics = step_fn(state, teacher_params, batch)
            step += 1
            pending.append(metrics)
            chrono.tick(tokens_per_step)
            leaving = preemption.requested(step)
            if step % cfg.log_every == 0 or step == cfg.steps or leaving:
                skipped = _log(loop, chrono, step, pending, skipped)
                pending = []
            if cfg.eval_every and step % cfg.eval_every == 0 and step < cfg.steps:
                with chrono.paused():
                    _evaluate(loop, eval_fn, state, teacher_params, step)
            if leaving or (cfg.save_every and step % cfg.save_every == 0):
                with chrono.paused():
                    _save(loop, step, state)
                saved = step
            if leaving:
                break
        profile.stop()
        if step > saved:
            _save(loop, step, state)
        loop.store.wait()
        if step == cfg.steps:
            _evaluate(loop, eval_fn, state, teacher_params, step)
    loop.pipeline.close()
    loop.writer.close()
    return state


def _log(loop: Loop, chrono: Chrono, step: int, pending: list, skipped: int) -> int:
    """Write the interval's means; returns the number of steps skipped in a row so far."""
    cfg = loop.programs.run
    values = means(pending)  # waits for the device: what follows is honest time
    rates = chrono.rates()
    out = {f"train/{k}" if "/" not in k else k: v for k, v in values.items()}
    out |= {f"perf/{k}": v for k, v in rates.items()}
    share = mfu(
        rates["tokens_per_s"] / loop.mesh.size, loop.flops_per_token, device_kind(loop.mesh)
    )
    if share is not None:
        out["perf/mfu"] = share
    out["train/lr"] = float(loop.programs.learning_rate(step - 1))
    loop.writer.log(step, out)
    bad, longest = 0, 0
    for flag in jax.device_get([metrics["nonfinite"][0] for metrics in pending]):
        bad += int(flag)
        skipped = skipped + 1 if flag else 0
        longest = max(longest, skipped)
    if bad and (cfg.train.on_nonfinite == "abort" or longest >= SKIPS_ALLOWED):
        loop.store.close()
        raise UserError(
            f"{bad} of the last {len(pending)} steps before step {step} had a loss or gradient "
            "that is not finite; their updates were not applied. Last checkpoint: step "
            f"{loop.store.newest_valid()} of {cfg.out}. Set train.on_nonfinite=skip to go on, or "
            "start in a new config.out with a lower optim.peak_lr."
        )
    return skipped


def _evaluate(loop: Loop, eval_fn, state: TrainState, teacher_params: dict, step: int) -> None:
    """The stage's loss on held-out rows."""
    metrics = [
        eval_fn(state.params, teacher_params, place_batch(loop.mesh, batch))
        for batch in loop.holdout
    ]
    if metrics:
        loop.writer.log(step, {f"eval/{k}": v for k, v in means(metrics).items() if "/" not in k})


def _save(loop: Loop, step: int, state: TrainState) -> None:
    loop.store.save(
        step,
        params=state.params,
        opt_state=state.opt_state,
        data=loop.pipeline.get_state(),
        meta={"stage": loop.programs.run.stage, "devices": jax.device_count()},
    )


def _profile_window(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"train.profile={text!r} is not of the form FIRST:LAST, e.g. 10:13.")
    return int(first), int(last)


class Profile:
    """Traces the steps of a window "10:13"; a run that ends inside it still writes its trace."""

    def __init__(self, window: str, folder: Path):
        self.window, self.folder, self.running = _profile_window(window), folder, False

    def before(self, step: int) -> None:
        if self.window is None:
            return
        if not self.running and step in range(*self.window):
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.running = True
        if step == self.window[1]:
            self.stop()

    def stop(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
