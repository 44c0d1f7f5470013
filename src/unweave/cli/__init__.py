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
    except KeyboardInterrupt:
        print("unweave: stopped; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
