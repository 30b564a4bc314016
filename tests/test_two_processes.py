"""train.py as two processes through jax.distributed: the curve of one, ends that are told."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 300
SMALL = (
    f"--config.train.steps={STEPS}", "--config.train.log_every=1", "--config.train.save_every=50",
    "--config.data.rows=4", "--config.data.seq_len=64", "--config.data.workers=0",
    "--config.train.compute_dtype=float32", "--config.mesh.data=2",
)  # fmt: skip
MISSING = '--config.data.files=("/nonexistent/text.txt",)'
ENV = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
pytestmark = [pytest.mark.multihost, pytest.mark.timeout(600)]


def start(
    out: Path, processes: int, *flags: str, bad: int | None = None, wrong: str = MISSING
) -> list[subprocess.Popen]:
    """`train.py` on the pretraining of the tiny teacher, two devices in one process or in two.

    Process `bad` is given a `wrong` flag too, by default that of a file that is not there.
    """
    command = [sys.executable, "train.py", "--config=configs/tiny/pretrain.py", *SMALL, *flags]
    if processes == 1:
        own = [{"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}]
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        own = [together | {"JAX_PROCESS_ID": str(i)} for i in range(processes)]
    return [
        subprocess.Popen([*command, f"--config.out={out}", *([wrong] if i == bad else [])],
                         cwd=ROOT, env=ENV | one, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
        for i, one in enumerate(own)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen], timeout: float = 240) -> tuple[list[int], list[str]]:
    """Exit codes and what was said; nothing outlives the test."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def curve(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def at_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Return when a run has logged and saved so much."""
    saved = out / "checkpoints" / str(step) / "manifest.json"
    for _ in range(2000):
        assert process.poll() is None, process.communicate()[0]
        if saved.is_file():
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not saved")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    codes, said = ended(start(out, 1))
    assert codes == [0], said
    return curve(out)


def test_two_processes_walk_the_curve_of_one_and_resume_as_one(alone, tmp_path):
    out = tmp_path / "run"
    both = start(out, 2)
    at_step(both[0], out, 50)
    both[1].send_signal(signal.SIGTERM)  # both save at one step and leave
    codes, said = ended(both)
    assert codes == [0, 0], "\n".join(said)
    assert 50 <= max(curve(out)) < STEPS
    codes, said = ended(start(out, 1))
    assert codes == [0] and "start: resume step" in said[0], said
    assert curve(out) == alone


def test_one_process_resumes_as_two(alone, tmp_path):
    out = tmp_path / "run"
    one = start(out, 1)
    at_step(one[0], out, 50)
    one[0].send_signal(signal.SIGTERM)
    assert ended(one)[0] == [0] and max(curve(out)) < STEPS
    codes, said = ended(start(out, 2))
    assert codes == [0, 0] and "start: resume step" in said[0], said
    assert curve(out) == alone


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named(victim, tmp_path):
    out = tmp_path / "run"
    both = start(out, 2, "--config.train.steps=100000")
    at_step(both[0], out, 50)
    both[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, said = ended(both, 60)
    assert time.monotonic() - began < 30
    other = 1 - victim
    assert codes[victim] == -signal.SIGKILL and codes[other] not in (0, -signal.SIGKILL)
    assert f"error: process {victim} of 2 is gone" in said[other], said[other]


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_one_process_ends_both(bad, tmp_path):
    codes, said = ended(start(tmp_path / "run", 2, bad=bad), 120)
    assert codes[bad] == 2 and "error: " in said[bad] and "/nonexistent/text.txt" in said[bad]
    assert codes[1 - bad] not in (0, 2), said[1 - bad]
    assert f"error: process {bad} of 2 is gone" in said[1 - bad], said[1 - bad]


@pytest.mark.parametrize(
    "wrong, key",
    [
        ("--config.optim.peak_lr=0.1", "config.optim.peak_lr: expected 0.003, got 0.1"),
        ("--config.data.seed=5", "config.data.seed: expected 0, got 5"),
    ],
)
def test_processes_with_different_configs_do_not_train(wrong, key, tmp_path):
    codes, said = ended(start(tmp_path / "run", 2, bad=1, wrong=wrong), 120)
    assert codes == [2, 2], "\n".join(said)
    for text in said:
        assert "process 1 of 2 was not given what process 0 was" in text and key in text
    assert not (tmp_path / "run/config.json").exists()
