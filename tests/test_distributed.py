"""Signals ask once and handlers come back; two processes agree on steps and checkpoints."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hydrajax import distributed
from hydrajax.distributed import Preemption, decide_once, gather_json

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_and_handlers_come_back(number, capfd):
    before = [signal.getsignal(s) for s in Preemption.SIGNALS]
    with Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), number)
        assert preemption.requested(2) and preemption.requested(3)
    assert [signal.getsignal(s) for s in Preemption.SIGNALS] == before
    assert "saving after this step" in capfd.readouterr().err


def test_no_handlers_outside_of_the_main_thread():
    seen = []

    def body():
        with Preemption() as preemption:
            seen.append(preemption.requested(1))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_second_interrupt_exits_at_once():
    code = (
        "import os, signal, time\n"
        "from hydrajax.distributed import Preemption\n"
        "with Preemption():\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=50)  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "still here\n"), done.stderr


@pytest.mark.parametrize(
    ("env", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "3", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
    ],
)
def test_several_processes_only_when_indicated(env, several):
    assert distributed._several_indicated(env) == several


def test_one_process_needs_no_one():
    assert distributed.is_lead() and decide_once(lambda: 3) == 3
    assert gather_json({"a": [1]}) == [{"a": [1]}]


TWO = """
import os, signal, sys
from hydrajax import distributed
distributed.start()
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from hydrajax.checkpoint import CheckpointStore
from hydrajax.distributed import Preemption, decide_once, gather_json
me = jax.process_index()
assert jax.process_count() == 2 and gather_json("x" * me) == ["", "x"]
assert decide_once(lambda: 5) == 5

mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("d"))
want = np.arange(8, dtype=np.float32)
params = {"layers.0.w": jax.make_array_from_callback((8,), split, lambda i: want[i])}
target = {"layers.0.w": jax.ShapeDtypeStruct((8,), np.float32, sharding=split)}
store = CheckpointStore(sys.argv[1])
with Preemption() as preemption:
    for step in range(1, 500):
        if (me, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        multihost_utils.process_allgather(np.int32(step))  # a step of training
        if preemption.requested(step):
            break
store.save(step, params=params, data={"at": step})
assert store.newest_valid() == step
found = store.restore(step, {"params": target})
shard = found["params"]["layers.0.w"].addressable_shards[0]
assert (np.asarray(shard.data) == want[shard.index]).all() and found["data"] == {"at": step}
store.close()
print("left at", step, flush=True)
"""


@pytest.mark.multihost
@pytest.mark.timeout(120)
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [
        subprocess.Popen([sys.executable, "-c", TWO, str(tmp_path)], cwd=ROOT, text=True,
                         env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=100)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    left = [next(x for x in text.splitlines() if x.startswith("left at")) for text in said]
    assert left[0] == left[1]
