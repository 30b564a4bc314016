"""Walk a family's whole road for several arms at once, one GPU an arm, into one result file.

python -m experiments.road --family=smollm2_135m --gpus=0,1 --results=results/road/x.json

The teacher must be imported and the text tokenised (README, "The full recipe"). Everything that
is done is done by the commands of README; this file starts them, times them and reads what they
wrote. Run it again after an interruption: every stage resumes.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from experiments.jobs import Done, Job, run_chains

STAGES = ("align", "distill", "extend")
PYTHON = sys.executable


def chain(family: str, arm: str, with_teacher: bool) -> list[Job]:
    """The commands of one arm, its evaluation last; one arm measures the teacher along."""

    def config(name: str, *options: str) -> str:
        return f"--config=configs/{family}/{name}.py" + (":" + ",".join(options) if options else "")

    variant = f"arm={arm}"
    jobs = [Job("select", (PYTHON, "-m", "hydrajax.selection", config("select", variant)))]
    jobs += [Job(s, (PYTHON, "train.py", config(s, variant))) for s in STAGES]
    measure = [
        PYTHON, "-m", "hydrajax.evals", config("eval"),
        f"--config.eval.runs=('{arm}=runs/{family}/{arm}/extend',)",
        f"--config.out=runs/{family}/{arm}/eval",
    ]  # fmt: skip
    if not with_teacher:
        measure.append("--config.teacher=")
    return [*jobs, Job("eval", tuple(measure))]


def stage_rows(family: str, arm: str) -> list[dict]:
    """What selection and training of an arm left in their folders."""
    root = Path("runs", family, arm)
    heads = json.loads((root / "select/heads.json").read_text())
    rows = [{"what": "selection", "arm": arm} | {k: v for k, v in heads.items() if k != "scores"}]
    for stage in STAGES:
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
    seconds = sum(r["seconds"] for r in rows if r["what"] == "command" and r["gpu"])
    return out | {"gpu_minutes": seconds / 60}


def report(args, finished: list[Done], arms: list[str]) -> dict:
    evals = {arm: eval_of(args.family, arm) for arm in arms}
    rows = [
        {"what": "command", "arm": d.chain, "name": d.name, "seconds": d.seconds, "gpu": d.gpu,
         "command": d.command.replace(PYTHON, "python")} for d in finished
    ]  # fmt: skip
    for arm in arms:
        rows += stage_rows(args.family, arm)
        rows += [{"what": "eval", "arm": arm} | row for row in evals[arm]["rows"]]
    first = evals[arms[0]]["meta"]
    meta = {
        "command": ["python", *sys.argv],
        "commit": args.commit or first["commit"],
        "versions": first["versions"],
        "device": f"{max(len(args.gpus), 1)} x {first['device'].split(' x ')[-1]}, one an arm",
        "date": first["date"],
        "seeds": first["seeds"] | {"train": 0, "select": 0},
    }
    return {"meta": meta, "rows": rows, "summary": summary(rows, evals, args.context)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", default="smollm2_135m")
    parser.add_argument("--arms", default="causal,random")
    parser.add_argument("--gpus", default="0", help="numbers, comma between; empty for the CPU")
    parser.add_argument("--context", type=int, default=1024, help="length that the summary names")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of this tree, where git is not at hand")
    args = parser.parse_args()
    args.gpus = tuple(filter(None, args.gpus.split(",")))
    arms = args.arms.split(",")
    chains = {arm: chain(args.family, arm, with_teacher=i == 0) for i, arm in enumerate(arms)}
    finished = run_chains(chains, args.gpus, Path("runs", args.family, "logs"))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report(args, finished, arms), indent=1) + "\n")
    print(f"wrote {args.results}")


if __name__ == "__main__":
    main()
