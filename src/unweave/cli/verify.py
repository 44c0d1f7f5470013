"""``unweave verify``"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unweave.cli._say import count, file_options, say, show

if TYPE_CHECKING:
    from unweave.formats import Verdict


def verify(
    thing: Annotated[str, typer.Argument(help="A checkpoint that `unweave inspect` knows, or a run folder.")],
    model: Annotated[str | None, typer.Option(help="Its model, where its files do not say.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to run through the model: hub dataset, file or folder.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Its site, where its files do not say: layers.12 or blocks.12.hook_resid_post.")
    ] = None,
    target_site: Annotated[str | None, typer.Option(help="What a transcoder writes to, likewise.")] = None,
    context_size: Annotated[int | None, typer.Option(min=2, help="Tokens per context, likewise.")] = None,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="Whether BOS is before each, likewise.")] = None,
    text_field: Annotated[str | None, typer.Option(help="The field of the data that holds the text.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Instead of a model: activations of its site, as `unweave harvest` writes them.")
    ] = None,
    other: Annotated[
        list[Path] | None, typer.Option(help="With --store: activations of a site it may be meant for. Repeatable.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="How many activations to measure on.")] = "4k",
    l0: Annotated[float | None, typer.Option(help="Its declared features per row.")] = None,
    fvu: Annotated[float | None, typer.Option(help="Its declared fraction of variance unexplained.")] = None,
    ce_recovered: Annotated[
        float | None, typer.Option(help="Its declared share of the model's loss recovered.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --store: go on although its files name another model or site.")
    ] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="What the files do not say, as name=value, such as k=32. Repeatable.")
    ] = None,
) -> None:
    """Measure a checkpoint against what its card declares, and name the known trap that explains a difference.

    For example: unweave verify sae/ --model HuggingFaceTB/SmolLM2-135M --data notes.jsonl --l0 50 --ce-recovered 0.97

    Exits with status 1 on a mismatch.
    """
    from unweave.errors import UnweaveError
    from unweave.workflows import verification

    shared = {"l0": l0, "fvu": fvu, "ce_recovered": ce_recovered, "n_rows": count(tokens)}
    shared |= file_options(option, verification.verify, verification.verify_in_model)
    in_model = {"model": model, "data": data, "site": site, "target_site": target_site}
    in_model |= {"context_size": context_size, "bos": bos, "text_field": text_field}
    if store is None:
        if other:
            raise UnweaveError("--other goes with --store; with a model the sites next to its own are tried by itself")
        if force:
            raise UnweaveError("--force goes with --store; with a model what is named on the command line counts")
        verdict = verification.verify_in_model(thing, **in_model, say=say, **shared)
    else:
        if given := [name for name, value in in_model.items() if value is not None]:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UnweaveError(f"the activations in a store are made already: give either --store or {flags}")
        verdict = verification.verify(thing, store, other or [], force=force, **shared)
    _show(verdict)
    if not verdict.matches:
        raise typer.Exit(1)


def _show(verdict: Verdict) -> None:
    from rich.table import Table

    table = Table(
        "", "measured", "declared", *["put right"] * (verdict.after is not None), box=None, padding=(0, 2, 0, 0)
    )
    for name in ("l0", "fvu", "dead", "ce_recovered"):
        row = [
            _number(getattr(verdict, name), "not measured"),
            _number(getattr(verdict.declared, name, None), "unknown"),
        ]
        if verdict.after is not None:
            row.append(_number(getattr(verdict.after, name), "not measured"))
        table.add_row(name.replace("_", " "), *row)
    show(table)
    for note in verdict.notes:
        typer.echo(f"note: {note}")
    if verdict.matches:
        typer.echo("as declared")
    else:
        typer.echo(f"not as declared: {verdict.trap or 'no known trap explains it'}")


def _number(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.4g}"
