"""Run chains of commands side by side, each chain in order and pinned to one GPU."""

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One command of a chain."""

    name: str
    command: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.command)


@dataclass(frozen=True)
class Done:
    """A job that ended well: its chain, how long it took, on which GPU ("" is the CPU)."""

    chain: str
    name: str
    command: str
    seconds: float
    gpu: str


def run_chains(chains: dict[str, list[Job]], gpus: tuple[str, ...], logs: Path) -> list[Done]:
    """Run all chains at once, the i-th on GPU i modulo their number; output goes to `logs`.

    A failed command ends its chain; the others finish first, then RuntimeError names each
    failure and its log. `logs/jobs.jsonl` keeps what ended well: called again, those jobs are not
    repeated, and a training run that was cut resumes by itself.
    """
    logs.mkdir(parents=True, exist_ok=True)
    places = {name: gpus[i % len(gpus)] if gpus else "" for i, name in enumerate(chains)}
    with ThreadPoolExecutor(max(len(chains), 1)) as pool:
        futures = [
            pool.submit(_run_chain, name, jobs, places[name], logs) for name, jobs in chains.items()
        ]
    failures = [str(f.exception()) for f in futures if f.exception() is not None]
    if failures:
        raise RuntimeError("; ".join(failures))
    return [done for f in futures for done in f.result()]


def _run_chain(chain: str, jobs: list[Job], gpu: str, logs: Path) -> list[Done]:
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    before = {(d.chain, d.command): d for d in _record(logs)}
    finished = []
    for job in jobs:
        if (chain, str(job)) in before:
            finished.append(before[chain, str(job)])
            continue
        log = logs / f"{chain}_{job.name}.log"
        begin = time.perf_counter()
        with log.open("a") as out:
            code = subprocess.run(
                job.command, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        seconds = round(time.perf_counter() - begin, 1)
        print(f"{chain:>10} {job.name:<10} {seconds:7.1f} s  exit {code}", flush=True)
        if code:
            raise RuntimeError(f"{chain}: {job.name} ended with exit code {code}, see {log}")
        finished.append(Done(chain, job.name, str(job), seconds, gpu))
        with (logs / "jobs.jsonl").open("a") as record:
            record.write(json.dumps(asdict(finished[-1])) + "\n")
    return finished


def _record(logs: Path) -> list[Done]:
    path = logs / "jobs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Done(**json.loads(line)) for line in lines]
