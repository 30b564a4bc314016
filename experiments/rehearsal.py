"""Rehearse the Qwen3 stages on TPU topologies and write the page that shows them.

    python -m experiments.rehearsal run [NAME ...]     compile; results/rehearsal/NAME.json
    python -m experiments.rehearsal table              docs/rehearsal.md from these files

Nothing is executed on a TPU, and none is needed: libtpu compiles (`pip install 'jax[tpu]'`). It
takes minutes a case on two cores; cases whose file is there are left out.
"""

import json
import subprocess
import sys
from pathlib import Path

from hydrajax.rehearse.chips import CHIPS, GIB
from hydrajax.rehearse.report import bytes_on_host
from hydrajax.sharding import MESH_AXES

REPO = Path(__file__).resolve().parents[1]
RESULTS, PAGE = REPO / "results" / "rehearsal", REPO / "docs" / "rehearsal.md"

# Heads are drawn, as many in every layer: the budget of a selection, with one shape to compile.
EVEN = "--config.select.alloc=per_layer"


def case(config: str, topology: str, *flags: str) -> tuple[str, ...]:
    return (f"--config=configs/{config}.py", f"--topology={topology}", EVEN, *flags)


def pod(data: int, fsdp: int, rows: int, accum: int = 1) -> tuple[str, ...]:
    mesh = f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"
    return (*mesh, f"--config.data.rows={rows}", f"--config.train.accum={accum}")


CASES = {
    "qwen3_1p7b_distill_v5p_host": case("qwen3_1p7b/distill", "v5p:2x2x1"),
    "qwen3_1p7b_distill_v5p_1024": case("qwen3_1p7b/distill", "v5p:8x8x16", *pod(16, 64, 4096)),
    "qwen3_1p7b_distill_v5e_256": case("qwen3_1p7b/distill", "v5e:16x16", *pod(1, 256, 1024)),
    "qwen3_1p7b_distill_v6e_256": case("qwen3_1p7b/distill", "v6e:16x16", *pod(1, 256, 1024)),
    "qwen3_8b_distill_v5e_host": case("qwen3_8b/distill", "v5e:2x2"),
    "qwen3_8b_distill_v5p_unsplit": case("qwen3_8b/distill", "v5p:8x8x16", *pod(-1, 1, 4096)),
    "qwen3_1p7b_extend_v5p_1024": case("qwen3_1p7b/extend", "v5p:8x8x16", *pod(16, 64, 1024)),
    "qwen3_1p7b_align_v5p_1024": case("qwen3_1p7b/align", "v5p:8x8x16", *pod(16, 64, 4096)),
    "qwen3_8b_distill_v5p_1024": case("qwen3_8b/distill", "v5p:8x8x16", *pod(4, 256, 4096)),
    "qwen3_8b_align_v5p_1024": case("qwen3_8b/align", "v5p:8x8x16", *pod(4, 256, 4096)),
    "qwen3_8b_extend_v5p_1024": case("qwen3_8b/extend", "v5p:8x8x16", *pod(4, 256, 1024)),
    "qwen3_1p7b_extend_v5e_256": case("qwen3_1p7b/extend", "v5e:16x16", *pod(1, 256, 512)),
}


def run(names: list[str]) -> None:
    """Compile the named cases, or all that have no result yet."""
    for name in names or CASES:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            continue
        command = [
            sys.executable,
            "-m",
            "hydrajax.rehearse",
            *CASES[name],
            f"--out={path.relative_to(REPO)}",
        ]
        print(f"\n== {name}", flush=True)
        done = subprocess.run(command, cwd=REPO, check=False)
        if done.returncode not in (0, 2) or not path.is_file():
            raise SystemExit(f"{name} failed with exit code {done.returncode}")


def page() -> str:
    """docs/rehearsal.md, of nothing but result files and the table of chips."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    order = [name for name in CASES if name in found]
    order += [name for name in found if name not in CASES]
    rows = [(name, found[name]["rows"][0]) for name in order]
    levels = {name: _level(found[name]) for name in order}
    chips = "\n".join(
        f"| {c.kind} | {c.peak / 1e12:.0f} | {c.hbm / GIB:.0f} | {c.hbm_bandwidth / 1e9:.0f} | "
        f"{c.ici_bandwidth / 1e9:.0f} |"
        for c in CHIPS
    )
    assumed = "\n".join(f"- {text}" for text in next(iter(found.values()))["meta"]["assumptions"])
    refused = "\n\n".join(f"`{name}`: {row['message']}" for name, row in rows if not row["fits"])
    return PAGE_TEXT.format(
        table="\n".join(_line(name, row) for name, row in rows),
        memory="\n".join(_memory(name, row, levels[name]) for name, row in rows),
        implementations=_implementations(rows),
        refused=refused or "None of these.",
        chips=chips,
        assumed=assumed,
    )


def _line(name: str, row: dict) -> str:
    mesh = " × ".join(str(row["mesh"].get(axis, 1)) for axis in MESH_AXES)  # once without `context`
    head = (
        f"| [{name}](../results/rehearsal/{name}.json) | {row['devices']} | {mesh} | "
        f"{row['rows']} × {row['seq_len']} / {row['accum']} | "
    )
    memory = row["memory_bytes"]
    used = f"{memory['total'] / GIB:.1f} of {memory['hbm'] / GIB:.1f}"
    if not row["fits"]:
        return head + f"**{used}: does not fit** | | | | |"
    sent = sum(row["sent_bytes"].values()) / 1e9
    (fast, slow), (low, high) = row["step_s"], row["mfu"]
    return head + (
        f"{used} | {row['flops'] / 1e12:.1f} | {sent:.2f} | {fast:.3f} to {slow:.3f}, "
        f"{row['bound']} | {low:.0%} to {high:.0%} |"
    )


def _level(result: dict) -> str:
    if "compile" not in result["rows"][0]["seconds"]:
        return "not compiled"  # its state alone was too large
    level = result["meta"]["optimization_level"]
    return "default" if level == "UNKNOWN" else level


def _memory(name: str, row: dict, level: str) -> str:
    names = ("parameters", "optimiser", "teacher", "activations", "other")
    cells = (row["memory_bytes"][key] for key in names)
    cells = ["–" if cell is None else f"{cell / GIB:.2f}" for cell in cells]
    for part, host in bytes_on_host(row).items():
        cells[names.index(part)] += f" and {host / GIB:.2f} in host memory"
    text = " | ".join(cells)
    return f"| {name} | {text} | {sum(row['seconds'].values()):.0f} | {level} |"


def _implementations(rows: list[tuple[str, dict]]) -> str:
    kinds = {
        "; ".join(f"{op} `{'`, `'.join(names)}`" for op, names in row["implementations"].items())
        for _, row in rows
        if row["fits"]
    }
    return "\n".join(f"- {kind}" for kind in sorted(kinds))


PAGE_TEXT = """# Rehearsal

The train step of `train.py`, compiled by libtpu for machines that are not there.
**Compiled and simulated, never executed on TPU silicon**: memory and collectives are read from the
executable, times are a roofline. This page is written by
`python -m experiments.rehearsal table` from the files that its first column links to.

| case | devices | mesh data × fsdp × context × model | rows × tokens / accum | HBM, GiB | TFLOP a device | sent, GB a device | step, s | MFU |
|---|---|---|---|---|---|---|---|---|
{table}

A range of step times is from "compute, HBM and links overlap fully" to "one after the other".
FA heads are a quarter of all, drawn, the same number in every layer.

## Memory, GiB a device

`activations` is what one micro-batch keeps for its backward pass, `other` is gradients, working
space and code; the last columns say how long tracing, lowering and compiling
took, on two busy cores.

| case | parameters | optimiser | teacher | activations | other | compiled in, s | compiler's level |
|---|---|---|---|---|---|---|---|
{memory}

`O0` (`JAX_OPTIMIZATION_LEVEL=O0`) compiles faster, to a program that the compiler optimised less:
memory and HBM traffic are then upper estimates.

## What does not fit

{refused}

## Implementations compiled in

{implementations}

Each row is of the commit that its file names. Since then GDN heads keep
less for the backward pass, and MLPs take more than 16,384 tokens of a device in pieces.

## Assumptions

{assumed}

| device | bf16 TFLOP/s | HBM, GiB | HBM, GB/s | sent over ICI, GB/s |
|---|---|---|---|---|
{chips}

Source of the chips' figures: docs.cloud.google.com/tpu/docs, pages v5e, v5p, v6e and tpu7x; of the
bidirectional ICI figure a device sends half. A TPU7x chip is two devices.
"""  # noqa: E501


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *names]:
            run(names)
        case ["table"]:
            PAGE.write_text(page())
        case _:
            raise SystemExit(__doc__)
