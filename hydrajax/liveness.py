"""When one of several processes dies, the others say which one and end.

Left alone they would wait for it inside a collective, for minutes or for ever. Every process keeps
a connection to the first one; the operating system closes it with the process that it belongs to.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
from typing import NoReturn

import jax

from hydrajax.distributed import gather_json, is_lead, own_address
from hydrajax.typing import UserError

JOIN_TIMEOUT_S = 120.0
# A machine that loses its power closes nothing: it is asked for a sign of life, and is gone after
# about half a minute without one.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
GRACE_S = 3.0  # in which all processes may end by themselves, of the same error
BYE = b"bye\n"


class Liveness:
    """A context that all processes enter and leave together; with one process it does nothing.

    Raises `UserError` when others do not come within `JOIN_TIMEOUT_S`. Inside, the end of a process
    ends the others with exit code 1 and one line on stderr that names it.
    """

    def __init__(self) -> None:
        self._links: dict[int, socket.socket] = {}  # process -> connection; of the lead, or to it
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._left = threading.Event()

    def __enter__(self) -> "Liveness":
        if jax.process_count() > 1:
            self._links = _meet_guests() if is_lead() else _meet_lead()
            for link in self._links.values():
                _keep_alive(link)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Say goodbye, unless an error is on its way: then the silence tells the others.

        An error may be what a lost process does to a collective: that is the line to end with.
        """
        if not self._links:
            return
        if kind is not None:
            self._thread.join(GRACE_S)  # ends the process if another one is gone
            return
        self._left.set()
        for link in self._links.values():
            with contextlib.suppress(OSError):  # gone already, and no longer needed
                link.sendall(BYE)
        self._thread.join(JOIN_TIMEOUT_S)

    def _watch(self) -> None:
        """Until all have said goodbye."""
        selector = selectors.DefaultSelector()
        for index, link in self._links.items():
            selector.register(link, selectors.EVENT_READ, index)
        waiting = dict(self._links)
        while waiting:
            for key, _ in selector.select():
                said = _line(waiting[key.data])
                if said not in (BYE, b""):
                    _leave(json.loads(said))
                if said != BYE and not self._left.is_set():
                    for other in waiting.values():
                        with contextlib.suppress(OSError):
                            other.sendall(json.dumps(key.data).encode() + b"\n")
                    _leave(key.data)
                selector.unregister(waiting.pop(key.data))


def _meet_guests() -> dict[int, socket.socket]:
    with socket.create_server(("", 0), backlog=jax.process_count()) as server:
        gather_json([own_address(), server.getsockname()[1]])
        server.settimeout(JOIN_TIMEOUT_S)
        links: dict[int, socket.socket] = {}
        while len(links) < jax.process_count() - 1:
            try:
                link, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, jax.process_count())) - set(links))
                raise UserError(
                    f"no sign of processes {missing} of {jax.process_count()} within "
                    f"{JOIN_TIMEOUT_S:g} s. See their logs."
                ) from None
            link.settimeout(5)  # who connects also speaks
            links[int(_line(link))] = link
    return links


def _meet_lead() -> dict[int, socket.socket]:
    address = tuple(gather_json(None)[0])
    try:
        link = socket.create_connection(address, JOIN_TIMEOUT_S)
    except OSError as error:
        raise UserError(f"process 0 cannot be reached at {address}: {error}") from error
    link.sendall(f"{jax.process_index()}\n".encode())
    return {0: link}


def _keep_alive(link: socket.socket) -> None:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _line(link: socket.socket) -> bytes:
    """What the other end says; b"" when it is gone."""
    said = b""
    with contextlib.suppress(OSError):
        while not said.endswith(b"\n"):
            more = link.recv(1)
            if not more:
                return b""
            said += more
        return said
    return b""


def _leave(index: int) -> NoReturn:
    """At once: the main thread waits where no exception reaches it."""
    text = (
        f"\nerror: process {index} of {jax.process_count()} is gone, see its log. What was saved "
        "is whole: start all processes again to resume.\n"
    )
    sys.stderr.flush()
    os.write(2, text.encode())
    os._exit(1)
