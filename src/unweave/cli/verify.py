"""``unweave verify``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import count, show


def verify(
    thing: Annotated[str, typer.Argument(help="A checkpoint that `unweave inspect` knows.")],
    store: Annotated[Path, typer.Option(help="Activations of its site, as `unweave harvest` writes them.")],
    l0: Annotated[float | None, typer.Option(help="Its declared features per row.")] = None,
    fvu: Annotated[float | None, typer.Option(help="Its declared fraction of variance unexplained.")] = None,
    other: Annotated[
        list[Path] | None, typer.Option(help="Activations of a site it may be meant for instead. Repeatable.")
    ] = None,
    rows: Annotated[str, typer.Option(help="How many rows to measure on.")] = "4k",
    option: Annotated[
        list[str] | None, typer.Option(help="What the files do not say, as name=value, such as k=32. Repeatable.")
    ] = None,
) -> None:
    """Measure a checkpoint on activations against what its card declares, and name the known trap that explains a
    difference. Exits with status 1 on a mismatch."""
    from rich.table import Table

    from unweave.config import apply_overrides
    from unweave.workflows.verification import verify as measure

    verdict, declared = measure(
        thing, store, other or [], n_rows=count(rows), l0=l0, fvu=fvu, **apply_overrides({}, option or [])
    )
    table = Table("", "measured", "declared", box=None, padding=(0, 2, 0, 0))
    for name in ("l0", "fvu", "dead"):
        said = declared.get(name)
        table.add_row(name, f"{getattr(verdict, name):.4g}", "unknown" if said is None else f"{said:.4g}")
    show(table)
    if verdict.matches:
        typer.echo("as declared")
        return
    typer.echo(f"not as declared: {verdict.trap or 'no known trap explains it'}")
    raise typer.Exit(1)
