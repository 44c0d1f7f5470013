"""``unweave open``"""

from __future__ import annotations

from typing import Annotated

import typer

from unweave.cli._say import RunFolder, say


def open_run(
    folder: RunFolder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8765,
    host: Annotated[
        str, typer.Option(help="Address to listen on; anything but loopback needs the printed token.")
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it moved.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on although the model is another one.")] = False,
) -> None:
    """Look at a run in the browser: overview, features, contexts, and your own text."""
    from unweave.runs import Run
    from unweave.web import serve

    run = Run(folder, model=model, force=force)
    say(f"{run!r}")
    serve(run, host=host, port=port, open_browser=browser)
