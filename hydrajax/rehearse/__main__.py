"""Compile a run's real train step for a TPU topology that is not there, and say what to expect.

    python -m hydrajax.rehearse --config=configs/qwen3_1p7b/distill.py --topology=v5p:8x8x16 \
        --config.data.rows=1024 [--out=result.json]

Compiled and simulated, nothing executed: memory and collectives are read from the executable, the
step time is a roofline whose assumptions are printed. Exit code 2, with the knob to turn, when the
step does not fit a device's HBM. Needs libtpu (`pip install libtpu`), no TPU.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from hydrajax.checkpoint import make_lineage
from hydrajax.command import run_command
from hydrajax.config import RunConfig
from hydrajax.flops import train_flops_per_token
from hydrajax.layout import Layout
from hydrajax.manifest import write_atomic
from hydrajax.metrics import sparkline
from hydrajax.rehearse.chips import GIB, chip_of
from hydrajax.rehearse.hlo import Program
from hydrajax.rehearse.memory import refusal
from hydrajax.rehearse.roofline import ASSUMPTIONS, roofline
from hydrajax.rehearse.step import (
    Compiled,
    Subject,
    compile_step,
    devices_of,
    implementations,
    lay_out_on,
)
from hydrajax.rehearse.traffic import KINDS, collectives, hbm_bytes
from hydrajax.typing import UserError

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "chip and grid, e.g. v5p:8x8x16", required=True)
OUT = flags.DEFINE_string("out", "", "write the result to this JSON file")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"leftover arguments {argv[1:]}; options are --config.data.rows=1024.")
    jax.config.update("jax_platforms", "cpu")  # nothing runs, on a TPU machine neither
    cfg = RunConfig.from_dict(CONFIG.value)
    layout, student = lay_out_on(cfg, devices_of(TOPOLOGY.value))
    print(f"{TOPOLOGY.value}: {layout.mesh.size} x {_kind(layout)}, mesh {_axes(layout)}; "
          f"compiled and simulated, nothing executed", flush=True)  # fmt: skip
    compiled = compile_step(layout)
    row = facts(layout, student, compiled) | expectation(layout, student, compiled)
    fits = row["fits"]
    print("\n".join(lines(row)))
    if OUT.value:
        write(Path(OUT.value), cfg, row)
    if not fits:
        raise UserError(f"{TOPOLOGY.value}: {row['message']}")


def facts(layout: Layout, student: Subject, compiled: Compiled) -> dict:
    """What was compiled, and what it keeps in memory."""
    cfg = layout.programs.run
    memory, counts = compiled.memory, [len(heads) for heads in student.plan.fa]
    fits = compiled.text is not None and memory.total <= memory.hbm
    return {
        "topology": TOPOLOGY.value,
        "stage": cfg.stage,
        "fits": fits,
        "message": "" if fits else refusal(cfg, _axes(layout), memory),
        "devices": layout.mesh.size,
        "device_kind": _kind(layout),
        "mesh": _axes(layout),
        "heads_kept_whole": len(layout.student.whole),
        "parameters": sum(a.size for a in layout.student.params.values()),
        "fa_heads": f"{sparkline(counts, student.plan.num_heads)} {student.plan.num_fa} of "
        f"{student.plan.num_layers * student.plan.num_heads}, {student.source}",
        "rows": cfg.data.rows,
        "seq_len": cfg.data.seq_len,
        "accum": cfg.train.accum,
        "remat": cfg.train.remat,
        "memory_bytes": memory.facts(),
        "seconds": compiled.seconds,
    }


def expectation(layout: Layout, student: Subject, compiled: Compiled) -> dict:
    """Traffic, roofline and utilisation of a step that fits; empty for one that does not."""
    if compiled.text is None:
        return {}
    cfg, chip = layout.programs.run, chip_of(_kind(layout))
    program = Program(compiled.text)
    moved, through_hbm = collectives(program, layout.mesh.size), hbm_bytes(program)
    tokens = cfg.data.rows * cfg.data.seq_len
    flops = tokens * train_flops_per_token(student.model, student.plan, cfg.data.seq_len, cfg.stage)
    times = roofline(chip, flops / layout.mesh.size, through_hbm, sum(moved.sent.values()))
    low, high = times.mfu
    return {
        "implementations": implementations(program),
        "flops": flops / layout.mesh.size,
        "hbm_traffic_bytes": through_hbm,
        "sent_bytes": {kind: moved.sent[kind] for kind in KINDS},
        "collectives": {kind: moved.count[kind] for kind in KINDS},
        "loops_counted_once": program.unknown_loops,
        "compute_s": times.compute_s,
        "hbm_s": times.hbm_s,
        "ici_s": times.ici_s,
        "bound": times.bound,
        "step_s": [times.floor_s, times.ceiling_s],
        "mfu": [low, high],
        "tokens_per_s": [tokens / times.ceiling_s, tokens / times.floor_s],
    }


def lines(row: dict) -> list[str]:
    """The screen."""
    memory = row["memory_bytes"]
    named = ("parameters", "optimiser", "teacher", "rows", "activations", "other")
    out = [
        f"{row['stage']}: {row['parameters']:,} parameters, {row['rows']} rows of {row['seq_len']} "
        f"tokens in {row['accum']} micro-batches, remat {row['remat']}",
        f"FA heads {row['fa_heads']}",
        "HBM a device  " + "  ".join(f"{k} {memory[k] / GIB:.2f}" for k in named if memory[k])
        + f"  total {memory['total'] / GIB:.2f} of {memory['hbm'] / GIB:.2f} GiB",
        "seconds       " + "  ".join(f"{k} {v}" for k, v in row["seconds"].items()),
    ]  # fmt: skip
    if "flops" not in row:
        return out
    sent = "  ".join(f"{k} {v / 1e9:.3f} ({row['collectives'][k]})"
                     for k, v in row["sent_bytes"].items() if v)  # fmt: skip
    chip = chip_of(row["device_kind"])
    once = row["loops_counted_once"]
    return out + [
        f"compiled in   {'  '.join(f'{k}: {", ".join(v)}' for k, v in row['implementations'].items())}",
        f"FLOPs         {row['flops'] / 1e12:.2f} T a device and step",
        f"sent, GB      {sent}" + (f"; {once} loops counted once" if once else "; loops included"),
        f"HBM traffic   {row['hbm_traffic_bytes'] / 1e9:.1f} GB",
        f"chip          {chip.peak / 1e12:.0f} TFLOP/s bf16, {chip.hbm_bandwidth / 1e9:.0f} GB/s HBM, "
        f"{chip.ici_bandwidth / 1e9:.0f} GB/s sent over ICI",
        f"roofline      compute {row['compute_s']:.4f} s  HBM {row['hbm_s']:.4f} s  "
        f"ICI {row['ici_s']:.4f} s: bound by {row['bound']}",
        f"step          {row['step_s'][0]:.4f} to {row['step_s'][1]:.4f} s, MFU "
        f"{row['mfu'][0]:.0%} to {row['mfu'][1]:.0%}",
        *(f"assumed       {text}" for text in ASSUMPTIONS),
    ]


def write(path: Path, cfg: RunConfig, row: dict) -> None:
    """The result file: meta, one row, summary."""
    meta = make_lineage(["python", "-m", "hydrajax.rehearse", *sys.argv[1:]], None)
    del meta["parent"], meta["parent_hash"]
    meta["versions"]["libtpu"] = importlib.metadata.version("libtpu")
    meta |= {
        "device": f"{TOPOLOGY.value}, compiled for and not executed on",
        "seeds": {"run": cfg.seed, "select": cfg.select.seed, "data": cfg.data.seed},
        "assumptions": list(ASSUMPTIONS),
    }
    summary = {k: row[k] for k in ("fits", "message", "bound", "step_s", "mfu") if row.get(k)}
    body = {"meta": meta, "rows": [row], "summary": {"fits": row["fits"]} | summary}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(body, indent=1) + "\n").encode())


def _kind(layout: Layout) -> str:
    return layout.mesh.devices.flat[0].device_kind


def _axes(layout: Layout) -> dict[str, int]:
    return dict(layout.mesh.shape)


if __name__ == "__main__":
    run_command(main)
