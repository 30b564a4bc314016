"""train.py as a command: the whole road, exact resumption after a kill, errors in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hydrajax.checkpoint import load_run, params_hash

REPO = Path(__file__).resolve().parents[1]
FAMILY = "smollm2_135m"
HOME = Path("runs/smoke") / FAMILY
ENV = {
    **os.environ,
    "PYTHONPATH": str(REPO),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
# One layer compiles in a third of the time of three.
TEACHER = ("teacher.py", "--config.model.num_layers=1")
# Long enough for a signal to arrive in the middle.
ALIGN = ("align.py:smoke", "--config.train.steps=40", "--config.train.save_every=8")


def command(config: str, *flags: str) -> list[str]:
    head = [str(REPO / "train.py")] if "select" not in config else ["-m", "hydrajax.selection"]
    if "--top_k=16" in flags:
        head = ["-m", "hydrajax.teacher_cache"]
    return [sys.executable, *head, f"--config={REPO}/configs/{FAMILY}/{config}", *flags]


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for process in STARTED:
        with process:  # waits, and closes its pipe
            process.kill()
    STARTED.clear()


def start(folder: Path, *args: str, devices: int = 1) -> subprocess.Popen:
    flags = f"{ENV['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    process = subprocess.Popen(
        command(*args), cwd=folder, env=ENV | {"XLA_FLAGS": flags}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def records(run: Path, key: str = "train/loss") -> dict[int, dict]:
    """Lines of metrics.jsonl that hold `key`, without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = {}
    for line in lines:
        if key in line:
            assert line["step"] not in kept, "a step is logged twice"
            kept[line["step"]] = {k: v for k, v in line.items() if not k.startswith("perf/")}
    return kept


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """A folder with teacher, heads and aligned student."""
    folder = tmp_path_factory.mktemp("road")
    for args in (TEACHER, ("select.py:smoke",), ALIGN):
        finish(start(folder, *args))
    return folder


def test_the_whole_road(road):
    for stage in ("distill", "extend"):
        finish(start(road, f"{stage}.py:smoke"))
    arm = road / HOME / "causal"
    assert (arm / "select/heads.json").is_file() and (arm / "select/heads.png").is_file()
    for run, parent in (
        (road / HOME / "teacher", None),
        (arm / "align", HOME / "teacher"),
        (arm / "distill", HOME / "causal/align"),
        (arm / "extend", HOME / "causal/distill"),
    ):
        names = {path.name for path in run.iterdir()}
        assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoints"}
        config = json.loads((run / "config.json").read_text())
        assert config["run"]["out"] == str(run.relative_to(road))
        assert config["lineage"]["parent"] == (None if parent is None else str(parent))
        if parent is not None:
            assert config["lineage"]["parent_hash"] == params_hash(road / parent)
        losses = [line["train/loss"] for line in records(run).values()]
        assert np.isfinite(losses).all()
        assert load_run(run).step == config["run"]["train"]["steps"]
        assert config["run"]["train"]["steps"] in records(run, "eval/loss")
    losses = [line["train/loss"] for line in records(arm / "align").values()]
    assert losses[-1] < 0.5 * losses[0]
    assert "kl" in str(records(arm / "distill"))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(road):
    """SIGKILL, then SIGTERM, then to the end: losses and parameters equal to the last bit."""
    args = (*ALIGN, "--config.out=runs/broken")
    broken, whole = road / "runs/broken", road / HOME / "causal/align"

    first = start(road, *args)
    wait_until(first, lambda: (broken / "checkpoints/8/manifest.json").is_file())
    first.kill()
    finish(first, -signal.SIGKILL)
    assert load_run(broken).step < 40

    second = start(road, *args)
    seen = load_run(broken).step
    story = read_until(second, "align")  # the first steps are logged
    second.terminate()
    finish(second)
    assert f"resume step {seen} of" in story
    stopped = load_run(broken).step
    assert seen < stopped < 40
    assert stopped == max(records(broken)), "SIGTERM saves the step it stops at"

    assert f"resume step {stopped} of" in finish(start(road, *args))
    assert records(broken) == records(whole)
    assert params_hash(broken) == params_hash(whole)


def test_a_run_with_split_tokens_goes_on_without(road):
    """Killed on two devices that share the tokens of a row, ended on one: the same losses."""
    args = (*ALIGN, "--config.out=runs/moved")
    moved, whole = road / "runs/moved", road / HOME / "causal/align"

    mesh = "--config.mesh.data=1", "--config.mesh.context=2"
    first = start(road, *args, *mesh, devices=2)
    wait_until(first, lambda: (moved / "checkpoints/8/manifest.json").is_file())
    first.kill()
    assert "'context': 2" in finish(first, -signal.SIGKILL)
    split = max(records(moved))

    assert "resume step" in finish(start(road, *args))
    want, got = records(whole), records(moved)
    assert want.keys() == got.keys() and split >= 8
    for step, line in want.items():  # bf16 rounds what is summed in another order
        assert got[step]["train/loss"] == pytest.approx(line["train/loss"], rel=5e-3), step


def test_a_student_distils_from_a_cache_without_the_teachers_weights(road):
    """Killed and resumed: a row that is not the cache's next would be refused."""
    teacher, out = road / "teachers/copy", road / "runs/cached"
    shutil.copytree(road / HOME / "teacher", teacher)
    args = ("distill.py:smoke", "--config.teacher=teachers/copy", "--config.out=runs/cached",
            "--config.train.steps=16", "--config.train.save_every=2",
            "--config.train.teacher_cache=caches/k16")  # fmt: skip
    said = finish(start(road, *args, "--top_k=16"))
    assert "64 rows and 64 held out, of 64 tokens, 16 of 259 words" in said
    for path in teacher.glob("checkpoints/*/params/**/*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))

    first = start(road, *args)
    wait_until(first, lambda: (out / "checkpoints/2/manifest.json").is_file())
    first.kill()
    finish(first, -signal.SIGKILL)
    assert load_run(out).step < 16
    said = finish(start(road, *args))
    assert "start: resume step" in said and "teacher: 16 best words of each token" in said
    assert records(out, "train/kl").keys() == set(range(1, 17))
    assert 16 in records(out, "eval/kl")
    assert load_run(out).info.lineage["teacher_cache"]["top_k"] == 16
    said = finish(start(road, *args, "--config.out=runs/x", "--config.data.seed=3"), 2)
    assert "data.seed: expected 3, got 0" in said and not (road / "runs/x").exists()


def wait_until(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get anywhere"
        time.sleep(0.02)


def read_until(process: subprocess.Popen, start: str) -> str:
    """Output up to the first line that begins with `start`."""
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith(start):
            return seen
    raise AssertionError(f"no line began with {start!r}: {seen}")


def test_mistakes_end_with_one_line_and_code_2(road):
    """All started at once: none of them gets as far as compiling."""
    cases = {
        "another config": (*ALIGN, "--config.optim.peak_lr=0.5"),
        "no parent": ("distill.py:smoke", "--config.out=runs/x", "--config.parent=runs/nowhere"),
        "no start": ("align.py:smoke", "--config.out=runs/x", "--config.heads="),
        "tokens": (
            "align.py:smoke",
            "--config.out=runs/x",
            "--config.data.seq_len=65",
            "--config.mesh.data=1",
            "--config.mesh.context=2",
        ),
        "variant": ("align.py:smok",),
        "value": ("align.py:smoke", "--config.hydra.fusion=average"),
    }
    started = {
        name: start(road, *args, devices=2 if name == "tokens" else 1)
        for name, args in cases.items()
    }
    outputs = {name: finish(process, 2) for name, process in started.items()}
    errors = {}
    for name, output in outputs.items():
        assert "Traceback" not in output, output
        errors[name] = next(line for line in output.splitlines() if line.startswith("error: "))
    assert "optim.peak_lr: 0.001 -> 0.5" in errors["another config"]
    assert "runs/nowhere" in errors["no parent"]
    assert "config.teacher and config.heads" in errors["no start"]
    assert "rows of 65 tokens cannot be split over mesh.context=2" in errors["tokens"]
    assert "'smok' is unknown" in errors["variant"]
    assert "fusion='average' is unknown" in errors["value"]
    assert not (road / "runs/x").exists()


def test_a_misspelt_flag_is_named():
    process = start(REPO, "align.py:smoke", "--config.optim.peak_rl=0.5")
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "peak_rl" in output and "peak_lr" in output
