"""Measure a teacher and its students.

    python -m hydrajax.evals --config configs/tiny/eval.py

Reads config.teacher, config.eval.runs ("runs/a" or "name=runs/a") and the held-out part of
config.data; writes eval.json, perplexity.png and needle_<task>_<model>.png into config.out.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import config_flags

from hydrajax.checkpoint import make_lineage
from hydrajax.command import run_command
from hydrajax.config import RunConfig
from hydrajax.evals import report
from hydrajax.evals.subject import Subject
from hydrajax.evals.suite import check_eval, evaluate
from hydrajax.generation import open_run
from hydrajax.sharding import one_device
from hydrajax.tokenizer import Tokenizer, load_tokenizer
from hydrajax.typing import UserError


def folders(cfg: RunConfig) -> dict[str, Path]:
    """Name -> run folder, teacher first; UserError when a name comes twice."""
    out = {"teacher": Path(cfg.teacher)} if cfg.teacher else {}
    for entry in cfg.eval.runs:
        name, sign, path = entry.partition("=")
        if not sign or Path(entry).exists():
            name, path = "/".join(Path(entry).parts[-2:]), entry
        if name in out:
            raise UserError(f"eval.runs: two models are named {name!r}; write 'other_name={path}'.")
        out[name] = Path(path)
    if not out:
        raise UserError("Nothing to measure: set config.teacher, config.eval.runs or both.")
    return out


def subjects(cfg: RunConfig, paths: dict[str, Path], tokenizer: Tokenizer) -> Iterator[Subject]:
    """Load one model after the other; all must read the prompts with the same tokenizer."""
    dtype = jnp.dtype(cfg.train.compute_dtype)
    for name, path in paths.items():
        run = open_run(path, dtype=dtype, tokenizer=cfg.tokenizer, kernels=cfg.kernels)
        if run.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{path}: its tokenizer.json differs from that of {next(iter(paths.values()))}; "
                "measure models with different tokenizers in runs of their own."
            )
        yield Subject(name, run.graphdef, run.params)


def run(cfg: RunConfig) -> None:
    if not cfg.out:
        raise UserError("config.out is empty; set the folder for eval.json.")
    check_eval(cfg)
    paths = folders(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer or next(iter(paths.values())))
    devices = jax.devices()
    meta = make_lineage(["python", "-m", "hydrajax.evals", *sys.argv[1:]], None) | {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "compute_dtype": cfg.train.compute_dtype,
        "seeds": {"eval": cfg.eval.seed, "data": cfg.data.seed},
        "models": {name: str(path) for name, path in paths.items()},
    }
    models = subjects(cfg, paths, tokenizer)
    for results in evaluate(models, cfg, tokenizer, has_teacher=bool(cfg.teacher)):
        written = report.write(cfg.out, {"meta": meta, **results})  # a cut run leaves the others
    report.show(results["rows"])
    print(f"{written[0]} and {len(written) - 1} figures")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"Arguments {argv[1:]} are unknown; settings are --config.name=value.")
    with jax.set_mesh(one_device()):
        run(RunConfig.from_dict(flags.FLAGS.config))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.mark_flag_as_required("config")
    run_command(main)
