"""What a run starts from, in this order: its own checkpoint, a parent run, teacher + head plan.

Each arrow of the road reads only the folder before it: a stage with a parent takes model, plan
and hydra flags from there, and `config.hydra` is read at the transplant alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hydrajax.checkpoint import CheckpointStore, Run, load_run, read_config
from hydrajax.config import HydraConfig, ModelConfig, RunConfig, to_plain
from hydrajax.distributed import gather_json
from hydrajax.head_plan import HeadPlan, load_plan
from hydrajax.model import init_params, load_model
from hydrajax.transplant import Teacher, transplant
from hydrajax.typing import Params, UserError

# What may change between a run and its resumption: nothing that alters the loss curve.
FREE_ON_RESUME = (
    "out", "train.log_every", "train.eval_every", "train.save_every", "train.keep",
    "train.profile", "train.tensorboard", "train.on_nonfinite", "mesh.", "kernels.", "select.",
    "eval.", "hydra.chunk", "optim.offload", "train.remat",
)  # fmt: skip

# Fields of a teacher that decide the shapes of its parameters.
SHAPES = ("family", "vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads",
          "head_dim", "tied_embeddings", "qk_norm", "qkv_bias", "out_bias", "mlp_bias")  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Shape of the student and, unless the run resumes, its first parameters."""

    story: str  # one line for the start-up screen
    model: ModelConfig
    hydra: HydraConfig
    plan: HeadPlan
    params: Params | None  # None: restore step `resume` of the run's own folder
    resume: int | None = None
    parent: Path | None = None


def find_start(
    cfg: RunConfig, store: CheckpointStore, calibration: Callable[[], list[dict[str, np.ndarray]]]
) -> Start:
    """Follow the order above; UserError lists what was looked for when there is nothing."""
    start = _find(cfg, store, calibration)
    check_expected(cfg.model, start.model, cfg.parent or cfg.teacher or cfg.out)
    return start


def read_teacher(cfg: RunConfig) -> Run:
    """The frozen teacher, with its weights."""
    return load_run(teacher_folder(cfg))


def teacher_folder(cfg: RunConfig) -> str:
    """Where the teacher lies; UserError if the config does not say."""
    if not cfg.teacher:
        raise UserError(f"stage {cfg.stage} needs config.teacher, the folder of the teacher.")
    return cfg.teacher


def check_expected(expected: ModelConfig | None, found: ModelConfig, where: str) -> None:
    """Refuse a teacher whose shapes are not those that the config names; None expects nothing."""
    wrong = [
        f"{name}: expected {getattr(expected, name)}, got {getattr(found, name)}"
        for name in SHAPES
        if expected is not None and getattr(expected, name) != getattr(found, name)
    ]
    if wrong:
        raise UserError(f"{where} is not of config.model: {'; '.join(wrong)}.")


def _find(
    cfg: RunConfig, store: CheckpointStore, calibration: Callable[[], list[dict[str, np.ndarray]]]
) -> Start:
    step = store.newest_valid()
    if step is not None:
        info = read_config(cfg.out)
        check_resumable(cfg, info.run)
        return Start(
            f"resume step {step} of {cfg.out}", info.model, info.hydra, info.plan, None, step
        )
    if cfg.stage == "pretrain" and not cfg.parent:
        return _from_scratch(cfg)
    if cfg.parent:
        run = load_run(cfg.parent)
        info, story = run.info, f"parent {cfg.parent}, step {run.step}"
        planned = info.run["train"]["steps"] if info.run else run.step
        if run.step < planned:
            raise UserError(
                f"{cfg.parent} stopped at step {run.step} of {planned}; run its command again to "
                "finish it, then this one."
            )
        if replace(cfg.hydra, chunk=info.hydra.chunk) not in (HydraConfig(), info.hydra):
            story += " (its hydra flags hold; this config's differ and are not read)"
        return Start(story, info.model, info.hydra, info.plan, run.params, parent=info.path)
    if cfg.teacher and cfg.heads:
        return _from_teacher(cfg, calibration())
    raise UserError(
        f"stage {cfg.stage} has nothing to start from: no checkpoint in {cfg.out}, config.parent="
        f"{cfg.parent!r}, config.teacher={cfg.teacher!r}, config.heads={cfg.heads!r}. Set "
        "config.parent, or config.teacher and config.heads."
    )


def _from_scratch(cfg: RunConfig) -> Start:
    model, hydra = cfg.model, HydraConfig.teacher()
    plan = HeadPlan.all_full(model.num_layers, model.num_heads, model.num_kv_heads)
    _, params = init_params(model, hydra, plan, cfg.seed)
    return Start(f"random weights, seed {cfg.seed}", model, hydra, plan, params)


def _from_teacher(cfg: RunConfig, batches: list[dict[str, np.ndarray]]) -> Start:
    run, plan = load_run(cfg.teacher), load_plan(cfg.heads)
    model = run.info.model
    plan.fits(model.num_layers, model.num_heads, model.num_kv_heads)
    graphdef, params = load_model(run, dtype=jnp.dtype(cfg.train.compute_dtype))
    hydra = cfg.hydra.for_stage(cfg.stage)
    student, report = transplant(Teacher(graphdef, params, model), hydra, plan, batches, cfg.seed)
    story = f"transplant of {cfg.teacher} by {cfg.heads}: {report}"
    return Start(story, model, cfg.hydra, plan, student, parent=run.info.path)


def check_resumable(cfg: RunConfig, stored: dict[str, Any] | None) -> None:
    """Refuse to resume under a config that would change the curve.

    A key that was not there yet when the run began stands for its default.
    """
    if stored is None:
        raise UserError(f"{cfg.out} holds weights of no run; set config.out to a new folder.")
    defaults = _leaves(to_plain(RunConfig()) | {"model": to_plain(ModelConfig)})
    now, before = _leaves(to_plain(cfg)), _leaves(stored)
    before = {key: defaults.get(key) for key in now} | before
    # Where it is only what the teacher should be, `check_expected` judges it.
    free = (*FREE_ON_RESUME, "model") if cfg.stage != "pretrain" else FREE_ON_RESUME
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in _differing(before, now)
        if not key.startswith(free)
    ]
    if changed:
        raise UserError(
            f"{cfg.out} holds a run with another config ({'; '.join(changed)}); restore these "
            "values to resume it, or set config.out to a new folder."
        )


def check_agreed(cfg: RunConfig, rows: dict[str, Any]) -> None:
    """Refuse processes of one run that were given other configs or rows than the first.

    They would train apart without a word, each its own part of the parameters.
    """
    first, *others = gather_json(_leaves({"config": to_plain(cfg), "rows": rows}))
    for process, given in enumerate(others, 1):
        differs = [
            f"{key}: expected {first.get(key)!r}, got {given.get(key)!r}"
            for key in _differing(first, given)
        ]
        if differs:
            raise UserError(
                f"process {process} of {len(others) + 1} was not given what process 0 was "
                f"({'; '.join(differs)}); start the same command on the same data everywhere."
            )


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys whose values are not the same, a missing one being None."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _leaves(tree: dict, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= (
            _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return out
