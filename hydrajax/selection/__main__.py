"""Choose the heads that stay full attention; writes heads.json and heads.png.

python -m hydrajax.selection --config=configs/tiny/select.py --config.select.ratio=0.125
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from hydrajax.checkpoint import Run, hash_params, load_run, make_lineage
from hydrajax.command import run_command
from hydrajax.config import KernelConfig, RunConfig, SelectConfig, to_plain
from hydrajax.head_plan import HeadPlan
from hydrajax.model import Model, abstract_model, bind, load_model, logical_axes
from hydrajax.selection import budget, report
from hydrajax.selection.diagnosis import diagnose
from hydrajax.selection.scorers import Context, Scores, score
from hydrajax.selection.work import Work
from hydrajax.sharding import make_mesh, param_shardings
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError

# What a control's plan depends on; the rest of SelectConfig says how effects are measured.
CONTROL_SETTINGS = ("scorer", "alloc", "unit", "ratio", "layers", "seed")
# What changes nothing that is measured, so that a killed run may go on under other values.
FREE = ("scorer", "alloc", "unit", "ratio", "layers", "fuse_norm", "general", "report")


def select(cfg: RunConfig, command: list[str]) -> Path:
    """Score the teacher's heads, choose, write and print; returns the path of heads.json."""
    began = time.perf_counter()
    for name in ("teacher", "out"):
        if not getattr(cfg, name):
            raise UserError(f"config.{name} is empty; set --config.{name}=FOLDER.")
    if jax.process_count() > 1:
        raise UserError(
            "selection runs in one process; start it on one host, with all its devices."
        )
    run = load_run(cfg.teacher)
    model = run.info.model
    if run.info.plan != HeadPlan.all_full(model.num_layers, model.num_heads, model.num_kv_heads):
        raise UserError(f"config.teacher={cfg.teacher} is a student; give its teacher's folder.")
    budget.check(cfg.select, model)
    out, mesh = Path(cfg.out), make_mesh(cfg.mesh)
    context = make_context(cfg, run, mesh)
    # Effects are small differences: no TF32 or bf16 passes hidden behind fp32 arrays.
    with jax.set_mesh(mesh), jax.default_matmul_precision("float32"), context.work.shown():
        scores = score(context)
    plan = budget.make_plan(scores.keys, cfg.select, model)
    share = budget.tie_share(scores.strength, plan, cfg.select, model) if scores.measured else None
    facts = (
        _provenance(cfg.select, scores)
        | make_lineage(command, None)
        | {
            "teacher": cfg.teacher,
            "teacher_hash": hash_params(run.params),
            "tie_share": share,
            "device": jax.devices()[0].device_kind,
            "seconds": round(time.perf_counter() - began, 1),
        }
    )
    del facts["parent"], facts["parent_hash"]  # the teacher, under its own name

    record = report.heads_record(scores, plan, model, cfg.hydra, facts)
    report.write(out, record, scores, plan)
    told = report.summary(record, plan, cfg.select)
    print(told)
    print(f"wrote {out / 'heads.json'} and heads.png in {facts['seconds']} s")
    if cfg.select.report == "full" and scores.effects is not None:
        with jax.set_mesh(mesh), jax.default_matmul_precision("float32"), context.work.shown():
            report.write_report(out, diagnose(context, scores), told)
        print(f"wrote {out / 'index.html'} with report.json and figures")
    context.work.clear()
    print(f"next: train.py, stage align, --config.teacher={cfg.teacher} "
          f"--config.heads={out / 'heads.json'}")  # fmt: skip
    return out / "heads.json"


def make_context(cfg: RunConfig, run: Run, mesh: Mesh) -> Context:
    """What scorers may use of a loaded teacher; parts of the measurement are kept in `out`."""
    identity = _identity(cfg, hash_params(run.params))
    return Context(
        cfg.select,
        run.info.model,
        cfg.data,
        load_model=partial(_on_mesh, run, cfg.kernels, mesh),
        load_tokenizer=partial(load_tokenizer, cfg.tokenizer or cfg.teacher),
        work=Work(Path(cfg.out) / "parts", identity, show=sys.stdout.isatty()),
    )


def _on_mesh(run: Run, kernels: KernelConfig, mesh: Mesh) -> Model:
    graphdef, params = load_model(run, dtype=jnp.float32, kernels=kernels)
    axes = logical_axes(abstract_model(run.info.model, run.info.hydra, run.info.plan))
    shardings = param_shardings(mesh, axes, {path: p.shape for path, p in params.items()})
    return bind(graphdef, jax.device_put(params, shardings))


def _identity(cfg: RunConfig, teacher_hash: str) -> dict[str, Any]:
    """What a part of the measurement depends on; the choice from scores may change between runs."""
    measured = {k: v for k, v in to_plain(cfg.select).items() if k not in FREE}
    return {"select": measured, "data": to_plain(cfg.data), "teacher": teacher_hash}


def _provenance(cfg: SelectConfig, scores: Scores) -> dict[str, Any]:
    """The settings that made the scores, and the pairs each probe rests on."""
    settings = to_plain(cfg)
    if not scores.measured:
        settings = {name: settings[name] for name in CONTROL_SETTINGS}
    return settings | {"probes": list(scores.counts), "pairs": scores.counts}


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"leftover arguments {argv[1:]}; options are --config.select.seed=1.")
    command = ["python", "-m", "hydrajax.selection", *sys.argv[1:]]
    select(RunConfig.from_dict(flags.FLAGS.config), command)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.mark_flag_as_required("config")
    run_command(main)
