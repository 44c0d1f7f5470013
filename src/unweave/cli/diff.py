"""``unweave diff``"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from unweave.cli._say import RunFolder, show

if TYPE_CHECKING:
    from rich.table import Table

    from unweave.workflows.diffing import Difference


def diff(
    folder: RunFolder,
    n: Annotated[int, typer.Option(min=1, help="Features to show of each group.")] = 10,
    exclusive: Annotated[
        float, typer.Option(help="At most this share of a feature's norm lies in the other model, if it is one's own.")
    ] = 0.1,
    even: Annotated[
        float, typer.Option(help="The shares of a shared feature differ from a half by at most this.")
    ] = 0.1,
) -> None:
    """Print which features of a crosscoder belong to one of its two models alone, and which both share.

    For example: unweave train --model BASE --against TUNED --site layers.12 --data notes.jsonl --k 64; unweave diff run

    In each group the features that fire most often come first. The cosine is that of a feature's two atoms: whether it
    means the same in both.
    """
    from unweave.runs import Run
    from unweave.workflows.diffing import diff as compare

    found = compare(Run(folder), exclusive=exclusive, even=even)
    for letter, name in zip("ab", found.parts):
        typer.echo(f"{letter}: {name}")
    show(_counts(found))
    for name, features in found.groups.items():
        if name != "in between" and len(features):
            show(_group(found, name, features[:n].tolist()))


def _counts(found: Difference) -> Table:
    table = _table("group", "features", "of all", title="")
    for name, count in {**{name: len(at) for name, at in found.groups.items()}, "dead": found.n_dead}.items():
        table.add_row(name, f"{count:,}", f"{count / len(found.density):.1%}")
    return table


def _group(found: Difference, name: str, features: list[int]) -> Table:
    from rich.text import Text

    table = _table("feature", "in b", "cosine", "density", title=f"\n{name}")
    table.add_column("context", no_wrap=True, overflow="ellipsis", ratio=1)
    for feature in features:
        row = found.features.summary(feature)
        numbers = (found.sorted.relative[feature], found.sorted.cosine[feature], row.density)
        shown = [f"{float(number):{how}}" for number, how in zip(numbers, (".3f", ".2f", ".2%"))]
        table.add_row(str(feature), *shown, Text(row.snippet.marked() if row.snippet else ""))
    return table


def _table(first: str, *numbers: str, title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True, min_width=8)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True, min_width=8)
    return table
