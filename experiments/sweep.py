"""Try variants of one stage side by side and print the held-out losses they end with.

python -m experiments.sweep --config=configs/smollm2_135m/distill.py --gpus=0,1 --out=runs/sweep \\
    'lr=4e-4: optim.peak_lr=4e-4' 'lr=1e-3: optim.peak_lr=1e-3' --common='train.steps=150'

A variant is `name: key=value key=value`; its run is a folder of its own under --out.
"""

import argparse
import json
import sys
from pathlib import Path

from experiments.jobs import Job, run_chains


def overrides(text: str) -> list[str]:
    return [f"--config.{item}" for item in text.split()]


def last_values(run: Path) -> dict[str, float]:
    """The last value of everything a run logged, layers left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {k: v for line in lines for k, v in line.items() if "/layer_" not in k}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", help="name: key=value ...")
    parser.add_argument("--config", required=True)
    parser.add_argument("--common", default="", help="overrides of all variants")
    parser.add_argument("--gpus", default="0", help="numbers, comma between; empty for the CPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    chains, settings = {}, {}
    for variant in args.variants:
        name, _, changes = variant.partition(":")
        settings[name] = changes.strip()
        command = [sys.executable, "train.py", f"--config={args.config}"]
        command += overrides(args.common) + overrides(changes)
        command.append(f"--config.out={args.out / name}")
        chains[name] = [Job("train", tuple(command))]
    run_chains(chains, tuple(filter(None, args.gpus.split(","))), args.out / "logs")
    rows = [
        {"variant": name, "overrides": settings[name]} | last_values(args.out / name)
        for name in chains
    ]
    (args.out / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        losses = {k: round(v, 4) for k, v in row.items() if k.startswith(("train/", "eval/"))}
        print(f"{row['variant']:>16}  {losses}")


if __name__ == "__main__":
    main()
