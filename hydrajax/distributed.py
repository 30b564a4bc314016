"""Several processes as one run: start-up, agreement, signals (who is gone: `liveness`)."""

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hydrajax.typing import UserError

ENVIRONMENT = "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"


def start() -> None:
    """Join the other processes if the environment speaks of any; else do nothing.

    TPU slices, SLURM and Open MPI are recognised by JAX itself; by hand, set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if jax.distributed.is_initialized() or not _several_indicated(os.environ):
        return
    try:
        jax.distributed.initialize(**_settings(os.environ))
    except (RuntimeError, ValueError) as e:
        raise UserError(f"The processes did not find each other: {e}. Check {ENVIRONMENT}.") from e


def is_lead() -> bool:
    """Whether this process writes files and speaks to the console."""
    return jax.process_index() == 0


def decide_once(decide: Callable[[], int]) -> int:
    """The lead's small integer, for all; its `UserError` ends the others too."""
    if jax.process_count() == 1:
        return decide()
    failed = int(np.iinfo(np.int32).min)
    answer, error = failed, UserError("The first process failed; its error tells why.")
    if is_lead():
        try:
            answer = decide()
        except UserError as e:
            error = e
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if answer == failed:
        raise error
    return answer


def gather_json(value: Any) -> list[Any]:
    """A JSON value of every process, in process order, known to all."""
    text = json.dumps(value, default=lambda x: x.tolist()).encode()  # numpy scalars and arrays
    if jax.process_count() == 1:
        return [json.loads(text)]
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


class Preemption:
    """SIGTERM or Ctrl-C -> `requested(step)` turns true once, at the same step on all processes.

    The first signal asks, a second Ctrl-C exits at once (checkpoints stay whole). With several
    processes SIGTERM belongs to JAX's preemption service, which finds a common step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        # Python allows handlers in the main thread only; elsewhere the default ones remain.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._receive) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to save after `step` and leave; to be called after every step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            os._exit(130)  # at once: no waiting for threads that write
        self._received = True
        # Not print(): a handler may interrupt a print under way.
        text = "saving after this step, then leaving (Ctrl-C again: at once)."
        os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())


def _several_indicated(env: Any) -> bool:
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    counts = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    return (
        any(env.get(name, "1").isdecimal() and int(env.get(name, "1")) > 1 for name in counts)
        or "," in hosts
        or "MEGASCALE_COORDINATOR_ADDRESS" in env
        or ("JAX_COORDINATOR_ADDRESS" in env and env.get("JAX_NUM_PROCESSES") != "1")
    )


def _settings(env: Any) -> dict[str, Any]:
    """Arguments by hand; JAX reads the address from the environment, but not the two numbers."""
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {key: env[name] for key, name in names.items() if name in env}
    for key, value in given.items():
        if not value.isdecimal():
            raise UserError(f"{names[key]}={value!r} is not a number.")
    return {key: int(value) for key, value in given.items()}


def own_address() -> str:
    """Address at which other processes reach this machine; nothing is sent.

    The one that leads to JAX's coordinator, else to the outside, else that of the host's name: a
    cluster without a way outside has no default route, and JAX keeps to itself what it read from
    SLURM or Open MPI.
    """
    host, _, port = os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")
    outside = ("192.0.2.1", 9)  # reserved for documentation, RFC 5737
    for target in ((host, int(port or 9)), outside, (socket.gethostname(), 9)):
        # Without a route or a name: the next one. In /etc/hosts a name is often a loopback.
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            address = str(probe.getsockname()[0])
            if not address.startswith("127."):
                return address
    return "127.0.0.1"  # no network: the processes share this machine
