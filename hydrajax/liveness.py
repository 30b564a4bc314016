"""When one of several processes dies, the others say which one and end.

Left alone they would wait for it inside a collective, for minutes or for ever. Every process keeps
a connection to the first one; the operating system closes it with the process that it belongs to.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
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
    token = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=128 + jax.process_count()) as server:
        gather_json([own_address(), server.getsockname()[1], token])
        return _admit(server, token, jax.process_count())


def _meet_lead() -> dict[int, socket.socket]:
    host, port, token = gather_json(None)[0]
    try:
        link = socket.create_connection((host, port), JOIN_TIMEOUT_S)
    except OSError as error:
        raise UserError(f"process 0 cannot be reached at {host}:{port}: {error}") from error
    link.sendall(_greeting(token, jax.process_index()))
    return {0: link}


def _greeting(token: str, index: int) -> bytes:
    """Of one length for all, so that no byte after it is read with it."""
    return f"{token} {index:08d}\n".encode()


def _admit(server: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    """The connection of each guest 1..count-1; port scans and health checks connect as well."""
    missing = {_greeting(token, index): index for index in range(1, count)}
    links: dict[int, socket.socket] = {}
    with contextlib.closing(_visitors(server, len(_greeting(token, 0)))) as visitors:
        for said, link in visitors:
            if said not in missing:
                link.close()
                continue
            links[missing.pop(said)] = link
            if not missing:
                return links
    raise UserError(
        f"no sign of processes {sorted(missing.values())} of {count} within "
        f"{JOIN_TIMEOUT_S:g} s. See their logs."
    )


def _visitors(server: socket.socket, length: int) -> Iterator[tuple[bytes, socket.socket]]:
    """Who connects within `JOIN_TIMEOUT_S`, with the first `length` bytes or all that was said.

    All are heard at once: one that says nothing keeps nobody waiting, and is closed at the end.
    """
    until = time.monotonic() + JOIN_TIMEOUT_S
    server.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        try:
            while (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.fileobj is server:
                        _accept(server, selector)
                    elif (said := _whole(key, length)) is not None:
                        selector.unregister(key.fileobj)
                        yield said, key.fileobj
        finally:
            for key in selector.get_map().values():
                if key.fileobj is not server:
                    key.fileobj.close()


def _accept(server: socket.socket, selector: selectors.BaseSelector) -> None:
    with contextlib.suppress(BlockingIOError, ConnectionAbortedError):  # it has left already
        link, _ = server.accept()
        link.setblocking(False)
        selector.register(link, selectors.EVENT_READ, bytearray())


def _whole(key: selectors.SelectorKey, length: int) -> bytes | None:
    """What a connection has said once it is `length` bytes or the other end is gone; else None."""
    try:
        more = key.fileobj.recv(length - len(key.data))
    except OSError:  # gone as well
        more = b""
    key.data.extend(more)
    return bytes(key.data) if len(key.data) == length or not more else None


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
