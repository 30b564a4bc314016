"""Compile a run's real train step for a TPU topology that is not there, and say what to expect.

    python -m hydrajax.rehearse --config=configs/qwen3_1p7b/distill.py --topology=v5p:8x8x16 \
        --config.data.rows=1024 [--out=result.json]

Compiled and simulated, nothing executed: memory and collectives are read from the executable, the
step time is a roofline whose assumptions are printed. Exit code 2, with the knob to turn, when the
step does not fit a device's HBM. Needs libtpu (`pip install 'jax[tpu]'`), no TPU. 28 layers take
many minutes on two cores; JAX_OPTIMIZATION_LEVEL=O0 takes fewer, for a less optimised program, and
so does --config.select.alloc=per_layer, since layers of one shape share what is compiled.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from hydrajax.checkpoint import make_lineage
from hydrajax.command import run_command
from hydrajax.config import RunConfig
from hydrajax.manifest import write_atomic
from hydrajax.rehearse.report import make_row, screen
from hydrajax.rehearse.roofline import ASSUMPTIONS
from hydrajax.rehearse.step import compile_step, devices_of, lay_out_on
from hydrajax.typing import UserError

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "chip and grid, e.g. v5p:8x8x16", required=True)
OUT = flags.DEFINE_string("out", "", "write the result to this JSON file")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"leftover arguments {argv[1:]}; options are --config.data.rows=1024.")
    jax.config.update("jax_platforms", "cpu")  # nothing runs, on a TPU machine neither
    cfg, topology = RunConfig.from_dict(CONFIG.value), TOPOLOGY.value
    devices = devices_of(topology)  # says what is missing
    meta = make_meta(cfg, topology)  # before the minutes in which the source may change
    layout, student = lay_out_on(cfg, devices)
    print(
        f"{topology}: {layout.mesh.size} x {layout.device_kind}, mesh {dict(layout.mesh.shape)}; "
        "compiled and simulated, nothing executed",
        flush=True,
    )
    row = make_row(topology, layout, student, compile_step(layout))
    print(screen(row), flush=True)
    if OUT.value:
        write(Path(OUT.value), meta, row)
    if not row["fits"]:
        raise UserError(f"{topology}: {row['message']}")


def make_meta(cfg: RunConfig, topology: str) -> dict[str, Any]:
    """Where the figures come from."""
    meta = make_lineage(["python", "-m", "hydrajax.rehearse", *sys.argv[1:]], None)
    del meta["parent"], meta["parent_hash"]
    meta["versions"]["libtpu"] = importlib.metadata.version("libtpu")
    return meta | {
        "device": f"{topology}, compiled for and not executed on",
        "seeds": {"run": cfg.seed, "select": cfg.select.seed, "data": cfg.data.seed},
        "optimization_level": jax.config.jax_optimization_level,
        "assumptions": list(ASSUMPTIONS),
    }


def write(path: Path, meta: dict[str, Any], row: dict[str, Any]) -> None:
    """The result file: meta, one row, summary."""
    summary = {k: row[k] for k in ("fits", "message", "bound", "step_s", "mfu") if k in row}
    body = {"meta": meta, "rows": [row], "summary": summary}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(body, indent=1) + "\n").encode())


if __name__ == "__main__":
    run_command(main)
