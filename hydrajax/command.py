"""How every command starts and ends: quiet libraries, one line for a user error, exit code 2."""

import sys
from collections.abc import Callable

from absl import app, logging

from hydrajax.typing import UserError


def run_command(main: Callable[[list[str]], None]) -> None:
    """`app.run(main)` with UserError printed without a traceback.

    Orbax reports each file it writes at INFO, which would bury the progress line.
    """

    def quiet(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        main(argv)

    try:
        app.run(quiet)  # config files run while flags are parsed: their errors end here too
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
