"""The command line: one file per verb, each of which parses, calls the library and prints."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``unweave``: run a verb; bad input ends with one sentence and exit status 2."""
    from unweave.cli._app import app
    from unweave.errors import UnweaveError

    try:
        app()
    except UnweaveError as error:
        print(f"unweave: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C, which the command line library turns into an exit
            print("unweave: stopped; the same command continues from the last checkpoint", file=sys.stderr)
        raise
