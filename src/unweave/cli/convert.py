"""``unweave convert``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import file_options, say


def convert(
    thing: Annotated[str, typer.Argument(help="A run, or a checkpoint of any library that `unweave inspect` knows.")],
    to: Annotated[str, typer.Option(help="The format to write, such as saelens or sparsify.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    model: Annotated[str | None, typer.Option(help="Its model, where its files do not say.")] = None,
    site: Annotated[str | None, typer.Option(help="Its site, likewise: layers.12.")] = None,
    target_site: Annotated[str | None, typer.Option(help="What a transcoder writes to, likewise.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="What the files do not say, as name=value, such as k=32. Repeatable.")
    ] = None,
) -> None:
    """Write a dictionary as another library's checkpoint, read back to see that it computes the same."""
    from unweave.workflows.conversion import convert as write

    known = {"model": model, "site": site, "target_site": target_site}
    facts = write(thing, to, out, **known, **file_options(option, write))
    say(f"wrote {out}: {facts.architecture}, {facts.d_in} -> {facts.n_features:,} features, as {facts.format}")
