"""What is left of an evaluation: eval.json, its figures and the table on the console."""

import json
import os
import re
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

FILE = "eval.json"


def write(folder: str | Path, report: dict) -> list[Path]:
    """Write eval.json, then the figures beside it; each appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    written = [_replace(folder / FILE, lambda path: path.write_text(text, encoding="utf-8"))]
    rows = report["rows"]
    for name, task in dict.fromkeys((r["model"], r["task"]) for r in rows if "task" in r):
        path = folder / f"needle_{task}_{file_name(name)}.png"
        figure = heat_map([r for r in rows if (r["model"], r.get("task")) == (name, task)])
        written.append(_replace(path, lambda p, f=figure: f.savefig(p, format="png", dpi=120)))
    losses = [r for r in rows if r["metric"] == "perplexity"]
    if losses:
        figure = loss_by_context(losses)
        path = folder / "perplexity.png"
        written.append(_replace(path, lambda p: figure.savefig(p, format="png", dpi=120)))
    return written


def file_name(name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^\w.=-]+", "_", name).strip("_")


def heat_map(rows: list[dict]) -> Figure:
    """Exact match of one model and task, depth x length."""
    cells = {(r["depth"], r["length"]): r for r in rows if r["depth"] is not None}
    depths, lengths = (sorted({key[i] for key in cells}) for i in (0, 1))
    counts = sorted({r["n"] for r in cells.values()})
    figure = Figure(figsize=(2 + 0.9 * len(lengths), 1.8 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    values = [[cells[d, t]["exact"] for t in lengths] for d in depths]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            ink = "white" if value < 0.6 else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=9, color=ink)
    beyond = {r["length"] for r in rows if r["beyond_context"]}
    axes.set_xticks(range(len(lengths)), [f"{t}*" if t in beyond else f"{t}" for t in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:.2f}" for d in depths])
    axes.set_xlabel("context, tokens" + " (* beyond the trained context)" * bool(beyond))
    axes.set_ylabel("depth of the answer")
    n = ", ".join(map(str, counts))
    axes.set_title(f"{rows[0]['task']}\n{rows[0]['model']}, N = {n} a cell", fontsize=10)
    figure.colorbar(image, label="exact match")
    return figure


def loss_by_context(rows: list[dict]) -> Figure:
    """Loss against the number of tokens seen, all models, one panel for each row length."""
    lengths = sorted({r["length"] for r in rows})
    figure = Figure(figsize=(1 + 4.5 * len(lengths), 3.8), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axes, length in zip(panels, lengths, strict=True):
        here = [r for r in rows if r["length"] == length]
        for row in here:
            bins = row["by_context"]
            dashes = "--" if row["model"].endswith("(LA zeroed)") else "-"
            axes.plot([b["from"] for b in bins], [b["nats"] for b in bins], dashes, marker=".",
                      label=f"{row['model']}: {row['nats']:.3f}")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context, tokens (start of bin)")
        axes.set_title(f"rows of {length}, N = {here[0]['tokens']:,} tokens", fontsize=10)
        axes.legend(fontsize=7)
    panels[0].set_ylabel("loss, nats a token")
    return figure


def table(rows: list[dict]) -> Table:
    """Metrics down, models across; recall with its 95 % interval."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        for label, text in _cells(row):
            cells.setdefault(label, {})[row["model"]] = text
    out = Table(title="recall: exact match [95 % Wilson interval], * beyond the trained context")
    out.add_column("metric")
    for name in models:
        out.add_column(name, justify="right")
    for label, texts in cells.items():
        out.add_row(label, *(texts.get(name, "") for name in models))
    return out


def show(rows: list[dict]) -> None:
    """Print the table; without a terminal as wide as it needs to be."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table(rows))


def _cells(row: dict) -> list[tuple[str, str]]:
    """(label, text) of a report row in the table."""
    star = "*" if row.get("beyond_context") else ""
    if row["metric"] == "perplexity":
        at = f"@ {row['length']} (N = {row['tokens']:,})"
        return [(f"perplexity {at}", f"{row['ppl']:.3f}{star}"),
                (f"nats/token {at}", f"{row['nats']:.4f}{star}"),
                (f"bits/byte {at}", f"{row['bits_per_byte']:.4f}{star}")]  # fmt: skip
    if row["metric"] == "agreement":
        n = f"(N = {row['tokens']:,})"
        return [(f"KL to teacher {n}", f"{row['kl']:.4f}"),
                (f"top-1 as teacher {n}", f"{row['top1']:.3f}")]  # fmt: skip
    if row["depth"] is not None:
        return []
    interval = f"{row['exact']:.2f} [{row['low']:.2f}, {row['high']:.2f}]{star}"
    at = f"{row['task']} @ {row['length']}"
    return [(f"{at} (N = {row['n']})", interval), (f"{at} tokens", f"{row['token_accuracy']:.2f}")]


def _replace(path: Path, write_to) -> Path:
    """Write beside the target, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
