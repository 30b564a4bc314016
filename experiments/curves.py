"""Train one student several times, with what differs said for each, and compare the loss curves.

    python -m experiments.curves --results=results/kernels/curves_h100.json \\
        'mosaic_gpu: kernels.gated_delta_rule=mosaic_gpu' 'xla: kernels.gated_delta_rule=xla' \\
        'xla_128: kernels.gated_delta_rule=xla hydra.chunk=128' -- \\
        --config=configs/smollm2_135m/distill.py --config.parent= --config.train.steps=200 \\
        --config.teacher=teachers/smollm2_135m --config.heads=HEADS.json

Runs follow each other, alone on the GPU, on the same batches. The second is the reference, and the
third is the same arithmetic in another order: how far two curves part by rounding alone.
"""

import argparse
import json
import math
import re
import statistics
import sys
from pathlib import Path

import jax

from experiments.jobs import Job, run_chains
from hydrajax.checkpoint import make_lineage

PYTHON = sys.executable


def job(text: str, train: list[str], root: Path) -> Job:
    """`name: key=value ...` as a command of train.py that writes to `root`/name."""
    name, colon, changes = text.partition(":")
    wrong = [item for item in changes.split() if "=" not in item]
    if wrong or not colon or not re.fullmatch(r"[\w-]+", name.strip()):
        raise SystemExit(f"{text!r}: expected 'name: key=value ...', got {wrong or repr(name)}")
    flags = [f"--config.{item}" for item in changes.split()]
    out = f"--config.out={root / name.strip()}"
    return Job(name.strip(), (PYTHON, "train.py", *train, *flags, out))


def row(name: str, command: str, seconds: float, folder: Path) -> dict:
    """The curve that a run left; its first interval compiled and is not timed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = [line["perf/tokens_per_s"] for line in lines if "perf/tokens_per_s" in line][1:]
    held = {k: v for line in lines for k, v in line.items() if k.startswith("eval/")}
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    found = {"run": name, "command": command.replace(PYTHON, "python"), "seconds": seconds}
    if timed:
        found["tokens_per_s"] = statistics.median(timed)
    return found | {"loss": losses} | held


def difference(a: dict[int, float], b: dict[int, float]) -> tuple[float, float]:
    """Largest and root mean square of the relative difference of two curves, b the base."""
    if a.keys() != b.keys():
        raise ValueError(f"curves of other steps: {sorted(a)} and {sorted(b)}")
    if not all(map(math.isfinite, (*a.values(), *b.values()))):
        raise ValueError("a curve is not finite")
    parts = [abs(a[step] - b[step]) / abs(b[step]) for step in b]
    return max(parts), statistics.fmean(x * x for x in parts) ** 0.5


def summary(rows: list[dict]) -> dict[str, float]:
    """`diff` of every run from the reference, rates, and rates by the reference's."""
    base, out = rows[1], {}
    for found in rows:
        name = found["run"]
        if found is not base:
            most, rms = difference(found["loss"], base["loss"])
            out |= {f"{name}_max_rel_diff": most, f"{name}_rms_rel_diff": rms}
        out[f"{name}_last_loss"] = list(found["loss"].values())[-1]
        if "tokens_per_s" in found:
            out[f"{name}_tokens_per_s"] = found["tokens_per_s"]
            out[f"{name}_speedup"] = found["tokens_per_s"] / base["tokens_per_s"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=3, help="name: key=value ... (subject, reference, reordered)")
    parser.add_argument("--root", type=Path, default=Path("runs/curves"))
    parser.add_argument("--gpu", default="", help="number; empty for the CPU")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this tree, where git is not at hand")
    own, train = sys.argv[1:], []
    if "--" in own:
        own, train = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    jobs = [job(text, train, args.root) for text in args.runs]
    if len({job.name for job in jobs}) < len(jobs):
        parser.error(f"runs need names of their own, got {[job.name for job in jobs]}")
    done = run_chains({"curves": jobs}, tuple(filter(None, [args.gpu])), args.root / "logs")
    rows = [row(d.name, d.command, d.seconds, args.root / d.name) for d in done]
    meta = make_lineage(["python", "-m", "experiments.curves", *sys.argv[1:]], None)
    del meta["parent"], meta["parent_hash"]
    device = f"1 x {jax.devices()[0].device_kind}"  # asked when the runs have left it
    meta |= {"device": device, "seeds": {"train": 0}}
    meta |= {"commit": args.commit} if args.commit else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    report = {"meta": meta, "rows": rows, "summary": {}}
    args.results.write_text(json.dumps(report, indent=1) + "\n")  # whatever they compare to
    report["summary"] = summary(rows)
    args.results.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
