"""How every command starts and ends: quiet libraries, one line for a user error, exit code 2.

Ctrl-C ends one of several processes at once, with exit code 130.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from absl import app, flags, logging

from hydrajax.typing import UserError


def run_command(main: Callable[[list[str]], None]) -> None:
    """`app.run(main)` with UserError printed without a traceback.

    Orbax reports each file it writes at INFO, which would bury the progress line.
    """

    def quiet(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        main(argv)

    try:
        with _interrupts_heard():
            app.run(quiet, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        _leave_interrupted()
        raise
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """One of several processes leaves at once: JAX's own way out waits there for all of them, who
    wait for this one."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def _interrupts_heard() -> Iterator[None]:
    """Ctrl-C ends one of several processes also while its main thread waits for the others.

    Python runs handlers when the main thread is back from C, which may be never; but it writes the
    number of each signal into the wakeup socket at once, and a thread can read it there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    heard, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    threading.Thread(target=_listen, args=(heard,), name="interrupts", daemon=True).start()
    before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        wakeup.close()  # which ends the thread


def _listen(heard: socket.socket) -> None:
    with heard:
        while number := heard.recv(1):
            # Another handler has its own plan for Ctrl-C: `Preemption` of a single process.
            default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            if number[0] == signal.SIGINT and default:
                _leave_interrupted()


def _leave_interrupted() -> None:
    """At once, if this is one of several processes: the others take its end as their sign."""
    if jax.distributed.is_initialized():
        print("interrupted", file=sys.stderr)
        _leave(130)


def _parse(argv: list[str]) -> list[str]:
    """Flags, config file and overrides; what they say of a mistake becomes one line."""
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            _ = flags.FLAGS.config.stage  # a file that failed to load says so only when read
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        said = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split())
        raise UserError(f"command line: {said}") from error
