"""``unweave export-store``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from unweave.cli._say import count, say


def export_store(
    thing: Annotated[str, typer.Argument(help="A run with features; with --store any run or checkpoint.")],
    out: Annotated[Path, typer.Option(help="The folder around delphi's hookpoints; one is added.")],
    to: Annotated[Literal["delphi"], typer.Option(help="The format to write.")] = "delphi",
    store: Annotated[Path | None, typer.Option(help="Activations to encode, instead of the run's own codes.")] = None,
    hookpoint: Annotated[str | None, typer.Option(help="The hookpoint's name; the site when left out.")] = None,
    model: Annotated[str | None, typer.Option(help="The model whose tokenizer delphi is to load.")] = None,
    splits: Annotated[int, typer.Option(help="Files to cut the features into.")] = 5,
    context_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a context, a multiple of delphi's windows.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Of --store: how many activations to encode.")] = None,
) -> None:
    """Write a run's codes as delphi's latent cache, for its explainers and scorers.

    For example: unweave export-store run --out latents
    """
    from unweave.workflows.stores import export_latents

    folder = export_latents(
        thing,
        out,
        store=store,
        hookpoint=hookpoint,
        model=model,
        n_splits=splits,
        context_size=context_size,
        n_rows=count(tokens) if tokens else None,
    )
    say(f"wrote {folder}, for {to}'s LatentDataset({str(out)!r}, ...)")
