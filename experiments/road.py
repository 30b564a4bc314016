"""Walk a family's whole road for several variants at once and write one result file.

python -m experiments.road causal random --family=smollm2_135m --gpus=0 --results=road.json

A variant is a name, or `name: key=value ...` with what differs: `arm` (how heads are chosen),
`preset`, or a config value of one command, `distill.optim.peak_lr=1e-3`; `--common` holds for all.
The teacher must be imported and the text tokenised (README, "The full recipe"). Everything that
is done is done by the commands of README; this file starts them, times them and reads what they
wrote. Variants share the GPUs given, side by side. Run it again after an interruption: every stage
resumes.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from experiments.jobs import Done, Job, run_chains

TRAINED = ("align", "distill", "extend")
COMMANDS = ("select", *TRAINED, "eval")
CONTROLS = ("random", "fixed", "layerwise")
PYTHON = sys.executable


@dataclass
class Variant:
    """One walk: folder name, how its heads are chosen, preset ("" is the family's), overrides."""

    name: str
    arm: str
    preset: str = ""
    overrides: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, common: str) -> "Variant":
        name, _, changes = text.partition(":")
        out = cls(name.strip(), name.strip() if name.strip() in CONTROLS else "causal")
        for item in f"{common} {changes}".split():
            key, _, value = item.partition("=")
            command, _, rest = key.partition(".")
            if key in ("arm", "preset"):
                setattr(out, key, value)
            elif command in COMMANDS and rest:
                out.overrides.setdefault(command, []).append(f"--config.{rest}={value}")
            else:
                raise SystemExit(f"{item!r}: expected arm=, preset= or COMMAND.key=, {COMMANDS}")
        return out


def chain(family: str, variant: Variant, commands: tuple[str, ...], with_teacher: bool):
    """The commands of one variant, its evaluation last; one variant measures the teacher along."""

    def config(command: str, **options: str) -> str:
        if variant.preset:
            options["preset"] = variant.preset
        text = ",".join(f"{k}={v}" for k, v in options.items())
        return f"--config=configs/{family}/{command}.py" + (f":{text}" if text else "")

    root, last = f"runs/{family}/{variant.name}", [c for c in commands if c in TRAINED][-1]
    lines = {
        "select": ["-m", "hydrajax.selection", config("select", arm=variant.arm),
                   f"--config.out={root}/select"],
        **{c: ["train.py", config(c, arm=variant.name)] for c in TRAINED},
        "eval": ["-m", "hydrajax.evals", f"--config=configs/{family}/eval.py",
                 f"--config.eval.runs=('{variant.name}={root}/{last}',)",
                 f"--config.out={root}/eval", *([] if with_teacher else ["--config.teacher="])],
    }  # fmt: skip
    return [
        Job(c, (PYTHON, *lines[c], *variant.overrides.get(c, [])))
        for c in COMMANDS
        if c in commands
    ]


def stage_rows(family: str, arm: str) -> list[dict]:
    """What selection and training of an arm left in their folders."""
    root = Path("runs", family, arm)
    heads = json.loads((root / "select/heads.json").read_text())
    rows = [{"what": "selection", "arm": arm} | {k: v for k, v in heads.items() if k != "scores"}]
    for stage in TRAINED:
        if not (root / stage).is_dir():
            continue
        lines = [json.loads(x) for x in (root / stage / "metrics.jsonl").read_text().splitlines()]
        logged = [x for x in lines if "perf/tokens_per_s" in x]
        last = {k: v for line in lines for k, v in line.items() if "/layer_" not in k}
        run = json.loads((root / stage / "config.json").read_text())["run"]
        tokens = run["data"]["rows"] * run["data"]["seq_len"] * run["train"]["steps"]
        row = {"what": stage, "arm": arm, "steps": run["train"]["steps"], "tokens": tokens}
        row |= {k: run["optim"][k] for k in ("peak_lr", "end_lr", "schedule")}
        for name in ("tokens_per_s", "mfu"):
            values = [x[f"perf/{name}"] for x in logged if f"perf/{name}" in x]
            row |= {name: statistics.median(values)} if values else {}
        rows.append(row | {k: v for k, v in last.items() if k.startswith(("train/", "eval/"))})
    return rows


def eval_of(family: str, arm: str) -> dict:
    return json.loads(Path("runs", family, arm, "eval/eval.json").read_text())


def summary(rows: list[dict], evals: dict[str, dict], context: int) -> dict:
    """Figures by name: recall and perplexity at `context`, rates of distill, minutes of GPU."""
    out: dict[str, float] = {}
    found = {k: v for e in evals.values() for k, v in e["summary"].items()}
    for model in ("teacher", *evals):
        for name, key in (("needle", "needle_single_2"), ("multikey", "needle_multikey_1")):
            if f"{model}/{key}@{context}" in found:
                out[f"{model}_{name}_{context}"] = found[f"{model}/{key}@{context}"]
        if f"{model}/ppl@{context}" in found:
            out[f"{model}_ppl"] = found[f"{model}/ppl@{context}"]
    distill = [r for r in rows if r["what"] == "distill"]
    for name in ("tokens_per_s", "mfu"):
        values = [r[name] for r in distill if name in r]
        if values:
            out[f"distill_{name}"] = statistics.median(values)
    return out | {"gpu_minutes": gpu_seconds(rows) / 60}


def gpu_seconds(rows: list[dict]) -> float:
    """Chains on one GPU ran side by side: a GPU was busy as long as its longest chain."""
    chains: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["what"] == "command" and row["gpu"]:
            key = row["gpu"], row["arm"]
            chains[key] = chains.get(key, 0.0) + row["seconds"]
    gpus = {gpu for gpu, _ in chains}
    return sum(max(t for (g, _), t in chains.items() if g == gpu) for gpu in gpus)


def report(args, finished: list[Done], variants: list[Variant]) -> dict:
    names = [v.name for v in variants]
    evals = {name: eval_of(args.family, name) for name in names}
    rows = [
        {"what": "command", "arm": d.chain, "name": d.name, "seconds": d.seconds, "gpu": d.gpu,
         "command": d.command.replace(PYTHON, "python")} for d in finished
    ]  # fmt: skip
    for name in names:
        rows += stage_rows(args.family, name)
        rows += [{"what": "eval", "arm": name} | row for row in evals[name]["rows"]]
    first = evals[names[0]]["meta"]
    meta = {
        "command": ["python", "-m", "experiments.road", *sys.argv[1:]],
        "commit": args.commit or first["commit"],
        "versions": first["versions"],
        "device": f"{max(len(args.gpus), 1)} x {first['device'].split(' x ')[-1]}",
        "sharing": f"{len(names)} variants side by side",
        "date": first["date"],
        "seeds": first["seeds"] | {"train": 0, "select": 0},
    }
    return {"meta": meta, "rows": rows, "summary": summary(rows, evals, args.context)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", help="name, or name: key=value ...")
    parser.add_argument("--family", default="smollm2_135m")
    parser.add_argument("--common", default="", help="key=value ... of all variants")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--gpus", default="0", help="numbers, comma between; empty for the CPU")
    parser.add_argument("--context", type=int, default=1024, help="length that the summary names")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this tree, where git is not at hand")
    args = parser.parse_args()
    args.gpus = tuple(filter(None, args.gpus.split(",")))
    commands = tuple(args.commands.split(","))
    if wrong := sorted(set(commands) - set(COMMANDS)):
        parser.error(f"--commands: unknown {wrong}, expected some of {COMMANDS}")
    if "eval" not in commands or not set(commands) & set(TRAINED):
        parser.error(f"--commands: needs eval and one of {TRAINED}, got {commands}")
    variants = [Variant.parse(text, args.common) for text in args.variants]
    chains = {
        v.name: chain(args.family, v, commands, with_teacher=i == 0) for i, v in enumerate(variants)
    }
    finished = run_chains(chains, args.gpus, Path("runs", args.family, "logs"))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report(args, finished, variants), indent=1) + "\n")
    print(f"wrote {args.results}")


if __name__ == "__main__":
    main()
