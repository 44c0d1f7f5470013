"""``unweave inspect``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import file_options, show


def inspect(
    thing: Annotated[str, typer.Argument(help="A run, dictionary, checkpoint of another library, store, or a model.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte of a store and check its hashes.")] = False,
    feature: Annotated[int | None, typer.Option(help="Print one feature of a run.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of other libraries' files, what they do not say, as name=value, such as k=32. Repeatable."),
    ] = None,
) -> None:
    """Say what a folder or file holds. For a model: its sites. No weights are read."""
    from unweave.workflows.inspection import card

    path = Path(thing)
    if feature is not None:
        from unweave.runs import Run

        features = Run(path).features
        if features is None:
            raise typer.BadParameter(f"{path} has no feature store yet: run `unweave index {path}` first")
        show(_plain(repr(features[feature])))
        return
    title, rows = card(path if path.exists() else thing, verify, **file_options(option, card))
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(f"[dim]{name}[/dim]", _plain(value))
    show(table)


def _plain(text: str):
    from rich.text import Text

    return Text(text)
