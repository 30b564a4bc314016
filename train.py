"""Train one stage:  python train.py --config=configs/tiny/align.py [--config.train.steps=100 ...]

Stages: pretrain (tiny teacher only), align, distill, extend. Each run has one folder, config.out:
config.json, tokenizer files, checkpoints/, metrics.jsonl. Run the same command again to resume.
"""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from hydrajax import distributed
from hydrajax.checkpoint import CheckpointStore, make_lineage, write_config
from hydrajax.command import run_command
from hydrajax.config import RunConfig, to_plain
from hydrajax.data.pipeline import loss_rows, make_pipeline
from hydrajax.data.taught import Taught, taught_rows
from hydrajax.layout import Layout, fill, head_split, lay_out
from hydrajax.liveness import Liveness
from hydrajax.loop import Loop, run_loop
from hydrajax.metrics import MetricWriter, sparkline, train_flops_per_token
from hydrajax.sharding import check_batch, device_kind, make_mesh
from hydrajax.start import check_agreed, find_start, read_teacher
from hydrajax.teacher_cache import open_cache
from hydrajax.tokenizer import check_vocabulary, load_tokenizer, save_tokenizer
from hydrajax.trainer import TrainState
from hydrajax.typing import UserError

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"leftover arguments {argv[1:]}; options are --config.train.steps=100.")
    cfg = RunConfig.from_dict(CONFIG.value)
    if not cfg.out:
        raise UserError("config.out is empty; name the run's folder.")

    distributed.start()
    with Liveness():
        train(cfg)


def train(cfg: RunConfig) -> None:
    # ---- devices -----------------------------------------------------------------------------
    mesh = make_mesh(cfg.mesh)
    check_batch(mesh, cfg.data.rows, cfg.data.seq_len, cfg.train.accum)
    say(f"{jax.device_count()} x {device_kind(mesh)}, mesh {dict(mesh.shape)}, run {cfg.out}")

    # ---- data --------------------------------------------------------------------------------
    source = cfg.tokenizer or cfg.teacher or cfg.parent
    tokenizer = load_tokenizer(source)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    pipeline = make_pipeline(cfg.data, tokenizer, **process)
    check_agreed(cfg, pipeline.identity)

    def calibration() -> list[dict]:
        """Training rows for the transplant, from the start of the stream, eight at a time."""
        rows = make_pipeline(replace(cfg.data, rows=8, workers=0), tokenizer)
        batches = max(1, cfg.train.calibration_tokens // (8 * cfg.data.seq_len))
        return [next(rows) for _ in range(batches)]

    # ---- what the run starts from ------------------------------------------------------------
    store = CheckpointStore(cfg.out, keep=cfg.train.keep)
    start = find_start(cfg, store, calibration)
    check_vocabulary(tokenizer, start.model.vocab_size, source)
    say(f"start: {start.story}")
    counts = [len(heads) for heads in start.plan.fa]
    say(f"FA heads a layer {sparkline(counts, start.plan.num_heads)} "
        f"({start.plan.num_fa} of {start.plan.num_layers * start.plan.num_heads})")  # fmt: skip
    holdout = loss_rows(cfg, tokenizer, multiple=mesh.shape["data"] * mesh.shape["fsdp"], **process)
    if cfg.train.teacher_cache:
        cache = open_cache(cfg, pipeline.identity, start.model.vocab_size)
        say(f"teacher: {cache.header.top_k} best words of each token, from {cache.path}")
        pipeline = Taught(pipeline, cache, cfg.train.kl_temperature, **process)
        holdout = taught_rows(cache, holdout, cfg.train.kl_temperature)
    if start.resume is None:
        lineage = make_lineage(sys.argv, start.parent)  # by all: processes read runs together
        if cfg.train.teacher_cache:
            lineage["teacher_cache"] = cache.header.summary()
        if distributed.is_lead():
            write_config(cfg.out, model=start.model, hydra=start.hydra, plan=start.plan,
                         run=to_plain(cfg), lineage=lineage)  # fmt: skip
            save_tokenizer(tokenizer, cfg.out)

    # ---- programs and state ------------------------------------------------------------------
    teacher = functools.cache(lambda: read_teacher(cfg))
    layout = lay_out(cfg, mesh, start, lambda: teacher().info)
    if split := head_split(start.plan, mesh):
        say(split)
    teacher_params = {} if layout.teacher is None else fill(layout.teacher, teacher())
    teacher.cache_clear()  # its copy on the host
    programs, places = layout.programs, layout.places
    if start.resume is None:
        params = {path: jnp.asarray(p, jnp.float32) for path, p in start.params.items()}
        params = jax.device_put(params, places.params)
        init = jax.jit(programs.tx.init, out_shardings=places.opt_state)
        step = jax.device_put(jnp.zeros((), jnp.int32), places.step)
        state = TrainState(step, params, init(programs.trainable(params)))
    else:
        state = restore(store, start.resume, layout, pipeline)

    # ---- loop --------------------------------------------------------------------------------
    total, trained = (sum(a.size for a in tree.values())
                      for tree in (layout.student.params, layout.trained()))  # fmt: skip
    say(f"{total:,} parameters, {trained:,} trained, "
        f"{cfg.data.rows * cfg.data.seq_len:,} tokens a step")  # fmt: skip
    writer = MetricWriter(
        Path(cfg.out), start_step=int(state.step), total_steps=cfg.train.steps, stage=cfg.stage,
        tensorboard=cfg.train.tensorboard,
    )  # fmt: skip
    loop = Loop(
        programs, mesh, places, pipeline, store, writer, holdout,
        flops_per_token=train_flops_per_token(start.model, start.plan, cfg.data.seq_len, cfg.stage,
                                              cached=bool(cfg.train.teacher_cache)),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        run_loop(loop, state, teacher_params)
    say(f"done: {cfg.out}")


def restore(store, step: int, layout: Layout, pipeline) -> TrainState:
    """State and data position of an interrupted run, placed on this mesh."""
    target = layout.state()
    found = store.restore(step, {"params": target.params, "opt_state": target.opt_state})
    pipeline.set_state(found["data"])
    count = jax.device_put(jnp.asarray(step, jnp.int32), layout.places.step)
    return TrainState(count, found["params"], found["opt_state"])


def say(line: str) -> None:
    """Start-up screen, from one process."""
    if distributed.is_lead():
        print(line, flush=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_command(main)
