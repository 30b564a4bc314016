"""Signals ask once and handlers come back; processes meet, agree on steps and end together."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from hydrajax import distributed, liveness
from hydrajax.distributed import Preemption, decide_once, gather_json
from hydrajax.typing import UserError

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


OUTSIDE, HOST = "192.0.2.1", "node7"


class Routes:
    """In place of `socket.socket`: the address from which each destination is reached."""

    def __init__(self, routes):
        self.routes, self.local = routes, None

    def __call__(self, *_, **__):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def connect(self, target):
        if target[0] not in self.routes:
            raise OSError(101, "Network is unreachable")
        self.local = self.routes[target[0]]

    def getsockname(self):
        return self.local, 40000


@pytest.mark.parametrize(
    ("coordinator", "routes", "address"),
    [
        ("10.0.0.1:8476", {"10.0.0.1": "10.0.0.1"}, "10.0.0.1"),  # no default route
        ("node0:8476", {"node0": "10.0.0.7", OUTSIDE: "172.16.0.7"}, "10.0.0.7"),
        ("node7:8476", {HOST: "127.0.0.1", OUTSIDE: "172.16.0.7"}, "172.16.0.7"),
        ("localhost:8476", {"localhost": "127.0.0.1"}, "127.0.0.1"),
        (None, {OUTSIDE: "172.16.0.7", HOST: "10.0.0.7"}, "172.16.0.7"),
        (None, {HOST: "10.0.0.7"}, "10.0.0.7"),  # SLURM: JAX alone knows the coordinator
        (None, {}, "127.0.0.1"),
    ],
)
def test_the_own_address_is_one_that_the_others_reach(coordinator, routes, address, monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    if coordinator:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", coordinator)
    monkeypatch.setattr(socket, "socket", Routes(routes))
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    assert distributed.own_address() == address


def test_strays_do_not_disturb_a_meeting(monkeypatch):
    here, strays, guests = threading.local(), [], []

    def guest(meeting, index):
        here.index, here.gathered = index, [meeting]
        (link,) = liveness._meet_lead().values()
        guests.append(link)
        link.sendall(b"from %d\n" % index)

    def gather(value):
        if value is None:
            return here.gathered
        for words in (None, b"", b"GET / HTTP/1.1\r\n" * 9, b"0" * 32 + b" 00000001\n"):
            strays.append(socket.create_connection(("127.0.0.1", value[1]), 10))
            if words is not None:
                strays[-1].sendall(words)
                strays[-1].shutdown(socket.SHUT_WR)
        for index in (3, 1, 2):  # two are expected
            threads.append(threading.Thread(target=guest, args=(value, index)))
            threads[-1].start()

    threads = []
    monkeypatch.setattr(liveness, "own_address", lambda: "127.0.0.1")
    monkeypatch.setattr(liveness, "gather_json", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    began = time.monotonic()
    links = liveness._meet_guests()
    assert time.monotonic() - began < 4
    for index, link in links.items():
        link.settimeout(10)
        assert liveness._line(link) == b"from %d\n" % index
    for thread in threads:
        thread.join()
    assert sorted(links) == [1, 2] and strays[0].recv(1) == b""  # the silent one was closed
    for link in (*links.values(), *guests, *strays):
        link.close()


def test_a_meeting_names_who_did_not_come(monkeypatch):
    strays = []

    def gather(value):
        strays.append(socket.create_connection(("127.0.0.1", value[1]), 10))

    monkeypatch.setattr(liveness, "JOIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(liveness, "gather_json", gather)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match=r"no sign of processes \[1, 2\] of 3 within 0.1 s"):
        liveness._meet_guests()
    strays[0].close()


INTERRUPTED = """
import os, signal, time
from hydrajax.command import run_command
from hydrajax.distributed import Preemption
def main(_):
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        print(preemption.requested(1), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
run_command(main)
"""


def test_an_interrupt_of_a_single_process_is_left_to_python():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True,
                          text=True, timeout=50)  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "True\n"), done.stderr
    assert "KeyboardInterrupt" in done.stderr


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


# One waits for the other where Python hears no signal; the other is in Python.
WAITING = """
import time
from hydrajax import distributed
from hydrajax.command import run_command
from hydrajax.liveness import Liveness
def main(_):
    distributed.start()
    with Liveness():
        print("met", flush=True)
        if not distributed.is_lead():
            time.sleep(100)
        distributed.gather_json(None)
run_command(main)
"""


def start_two(code: str, *arguments: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True,
                         env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
        for i in range(2)
    ]  # fmt: skip


@pytest.mark.multihost
@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", [0, 1])
def test_an_interrupt_of_one_process_ends_both(victim):
    both = start_two(WAITING)
    try:
        for process in both:
            while "met" not in (line := process.stdout.readline()):
                assert line, "ended before it met the other"
        time.sleep(0.5)  # until the lead waits
        both[victim].send_signal(signal.SIGINT)
        said = [process.communicate(timeout=20)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert both[victim].returncode == 130 and said[victim] == "interrupted\n", said[victim]
    other = 1 - victim
    assert both[other].returncode == 1, said[other]
    assert f"error: process {victim} of 2 is gone" in said[other], said[other]


@pytest.mark.multihost
@pytest.mark.timeout(120)
def test_two_processes(tmp_path):
    both = start_two(TWO, str(tmp_path))
    try:
        said = [process.communicate(timeout=100)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    left = [next(x for x in text.splitlines() if x.startswith("left at")) for text in said]
    assert left[0] == left[1]
