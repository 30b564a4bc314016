"""Compile every TPU kernel for every chip, without one, and write what their schedules cost.

    JAX_PLATFORMS=cpu python -m pallas_kernels.static --out results/kernels/tpu_static.json

Needs libtpu (`pip install 'jax[tpu]'`). Figures are of the compiler's
final schedule: nothing is executed, and waiting for HBM is not in them (`tpu_schedule`).
`--ops` and `--chips` limit what is compiled; a kernel that fails says so in its row and the rest
goes on.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import jax

from pallas_kernels import tpu_schedule
from pallas_kernels.attention import static_cases as attention
from pallas_kernels.bench import git, versions, write
from pallas_kernels.gated_delta_rule import static_cases as gated_delta_rule

__all__ = ["CASES", "main"]

CASES = (*gated_delta_rule.CASES, *attention.CASES)


def main(arguments: list[str] | None = None) -> dict:
    """Compile, print and write; return what was written."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    if (reason := tpu_schedule.unavailable()) is not None:
        sys.exit(f"pallas_kernels.static: {reason}")
    report = {"meta": _meta(arguments), "rows": [], "summary": {}}
    for case in CASES:
        if args.ops and case.name not in args.ops:
            continue
        for chip in args.chips:
            row = _row(case, chip)
            report["rows"].append(row)
            if "error" not in row:
                report["summary"][f"{case.name}_cycles_{chip}"] = row["cycles"]
            for loop in row.get("loops", ())[:1]:
                report["summary"][f"{case.name}_mxu_{chip}"] = loop["utilisation"]["MXU"]
            write(args.out, report)
            print(json.dumps(row), flush=True)
    print(json.dumps(report["summary"], indent=1))
    return report


def _parse(arguments: list[str]) -> argparse.Namespace:
    def words(text: str) -> tuple[str, ...]:
        return tuple(text.split(","))

    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.static")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ops", type=words, help="names of cases, all by default")
    parser.add_argument("--chips", type=words, default=tuple(tpu_schedule.CHIPS))
    args = parser.parse_args(arguments)
    for name, known in (("ops", {case.name for case in CASES}), ("chips", tpu_schedule.CHIPS)):
        if unknown := set(getattr(args, name) or ()) - set(known):
            parser.error(f"--{name}: expected some of {sorted(known)}, got {sorted(unknown)}")
    return args


def _row(case: tpu_schedule.Case, chip: str) -> dict:
    try:
        return case.row(chip)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        first = str(error).splitlines()[0]
        return {"op": case.name, "chip": chip, "error": f"{type(error).__name__}: {first}"}


def _meta(arguments: list[str]) -> dict:
    return {
        "command": " ".join(["python", "-m", "pallas_kernels.static", *arguments]),
        "commit": git("rev-parse", "--short", "HEAD"),
        "versions": versions(("jax", "jaxlib", "libtpu")),
        "device": "none: compiled and scheduled by libtpu on a CPU, never executed on TPU silicon",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seeds": {},
        "cycles": "VLIW bundles of one grid step by the units of work it does, without HBM stalls",
        "mxu_floor_cycles": "multiply-adds of the formulas, inverse apart, at the units' peak",
    }


if __name__ == "__main__":
    main()
