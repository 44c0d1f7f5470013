"""``unweave archs``"""

from __future__ import annotations

from typing import Annotated

import typer

from unweave.cli._say import show

NAME = Annotated[str | None, typer.Argument(help="One of them, to see all there is to know about it.")]


def archs(name: NAME = None) -> None:
    """List the architectures, or show one with its options."""
    show(_one(name) if name else _all())


def _all():
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from unweave.dictionaries import names
    from unweave.dictionaries.describe import describe

    table = Table("architecture", "what it does, what it is good for, and where it comes from", show_lines=True)
    for name in names():
        arch = describe(name)
        words = [arch.summary, arch.good_for and f"Good for {arch.good_for}.", arch.citation]
        table.add_row(name, _plain("\n".join(filter(None, words))))
    return Group(table, Text("unweave archs NAME shows one with all its options."))


def _plain(docstring: str):
    """A docstring as text: its brackets are no markup of rich's, its backticks only mark code for documents."""
    from rich.text import Text

    return Text(docstring.replace("``", ""))


def _one(name: str):
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from unweave.dictionaries.describe import describe

    arch = describe(name)
    facts = [*arch.paragraphs, arch.good_for and f"Good for: {arch.good_for}", arch.citation]
    facts += [f"Trained {arch.training}. Its decoder is {arch.decoder}."]
    table = Table(
        "option", "type", "default", "meaning", title=f"unweave train --arch {name} dictionary.options.OPTION=VALUE"
    )
    for option in arch.options:
        default = "required" if option.required else str(option.default)
        table.add_row(*map(_plain, (option.name, option.type, default, option.meaning)))
    return Group(Text(arch.name, style="bold"), *(_plain(f"{fact}\n") for fact in facts if fact), table)
