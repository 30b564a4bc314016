"""How every command starts and ends: quiet libraries, one line for a user error, exit code 2."""

import os
import sys
import traceback
from collections.abc import Callable
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
        app.run(quiet, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
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
