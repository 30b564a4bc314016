"""Measure an op and its peers on this machine and write every row as JSON as soon as it is there.

    python -m pallas_kernels.bench --op gated_delta_rule --out results/kernels/gdn_h100.json
    python -m pallas_kernels.bench --op attention --out results/scale/attention_h100.json

`--shapes 8x4096x16` (rows, tokens, heads) and `--implementations mosaic_gpu,xla` limit what is run;
what fails says so in its row and the rest goes on; nothing new is begun when `--limit` seconds are
over. With `--add` rows of an earlier run that this one does not measure stay in the file, if the
device was the same; ratios are never of two runs.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from pallas_kernels.attention import bench as attention
from pallas_kernels.gated_delta_rule import bench as gated_delta_rule
from pallas_kernels.timing import Clock

__all__ = ["git", "main", "make_meta", "shapes_of", "versions", "write"]

OPS = {"attention": attention, "gated_delta_rule": gated_delta_rule}
INTEGERS = ("dim", "repeats", "twin", "decode", "groups", "document", "seed")
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-triton",
    "torch",
    "triton",
    "fla-core",
    "flash_qla",
    "tilelang",
)


def main(arguments: list[str] | None = None) -> dict:
    """Run, print and write; return what was written."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, args = _parse(arguments)
    clock = Clock(args.limit)
    op = OPS[args.op]
    meta = make_meta("bench", arguments) | {"seeds": {"inputs": options.seed}} | op.WORDS
    kept, before = _earlier(args.out, meta) if args.add else ([], [])
    found = []
    for row in op.rows(options, clock):
        row = {"op": args.op} | row | {"at_s": round(args.limit - clock.left(), 1)}
        found.append(row | {"date": meta["date"]})
        names = {_name(row) for row in found}
        rows = [row for row in kept if _name(row) not in names] + found
        dates = {row["date"] for row in rows}
        runs = [run for run in before if run["date"] in dates]
        report = {"meta": meta | ({"earlier_runs": runs} if runs else {})}
        report |= {"rows": rows, "summary": op.summary(rows)}
        write(args.out, report)
        print(_line(found[-1]), flush=True)
    print(json.dumps(report["summary"], indent=1))
    return report


def _earlier(path: Path, meta: dict) -> tuple[list[dict], list[dict]]:
    """Rows and metas of the runs that a file holds."""
    if not path.is_file():
        return [], []
    try:
        old = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        sys.exit(f"{path} is no result file: {error}")
    if old["meta"]["device"] != meta["device"]:
        sys.exit(f"{path} was measured on {old['meta']['device']}, this is {meta['device']}")
    before = old["meta"].pop("earlier_runs", [])
    rows = [{"date": old["meta"]["date"]} | row for row in old["rows"]]
    return rows, [*before, old["meta"]]


def _name(row: dict) -> tuple:
    """What a row is of; the shape of time rows, so that implementations stay beside each other."""
    dims = tuple(row.get("dims", ()))
    if row["what"] in ("time", "packed"):
        return (row["what"], row.get("shape"), dims)
    return (*(row.get(key) for key in ("what", "implementation", "inputs")), dims)


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench")
    parser.add_argument("--op", choices=sorted(OPS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", type=shapes_of, help="BxTxR,...")
    parser.add_argument("--implementations", type=lambda x: tuple(x.split(",")))
    parser.add_argument("--parts", type=lambda x: tuple(x.split(",")))
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--limit", type=float, default=230.0, help="seconds")
    for name in INTEGERS:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seconds", type=float, help="about how long a repeat takes")
    args = parser.parse_args(arguments)
    names = ("shapes", "implementations", "parts", "seconds", *INTEGERS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    known = {field.name for field in dataclasses.fields(OPS[args.op].Options)}
    if other := sorted(given.keys() - known):
        parser.error(f"--op {args.op} knows no {', '.join(other)}")
    try:
        return OPS[args.op].Options(**given), args
    except ValueError as error:
        parser.error(str(error))


def shapes_of(text: str) -> tuple[tuple[int, ...], ...]:
    """BxTxR,... of the command line."""
    shapes = tuple(tuple(map(int, part.split("x"))) for part in text.split(","))
    if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError(f"expected BxTxR with positive numbers, got {text}")
    return shapes


def make_meta(module: str, arguments: list[str]) -> dict:
    """Where figures come from."""
    devices = jax.devices()
    command = ["python", "-m", f"pallas_kernels.{module}", *arguments]
    return {
        "command": " ".join(command),
        "commit": git("rev-parse", "--short", "HEAD"),
        "versions": versions(PACKAGES),
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")},
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git(*words: str) -> str:
    """Output of a git command, "unknown" where there is none."""
    try:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(path: Path, report: dict) -> None:
    """Whole or not at all: a run that is cut leaves the rows before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(path)


def _line(row: dict) -> str:
    words = ("what", "shape", "gates", "inputs", "implementation")
    figures = ("fwd_ms", "fwd_residuals_ms", "fwdbwd_ms", "ms", "gbps", "share_of_copy", "errors")
    head = " ".join(f"{row[w]!s:<11}" for w in words if w in row)
    tail = "  ".join(f"{f} {row[f]}" for f in (*figures, "error") if f in row)
    return f"{row['at_s']:7.1f} s  {head} {tail}"


if __name__ == "__main__":
    main()
