"""``unweave import-store``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import count, say


def import_store(
    folder: Annotated[Path, typer.Argument(help="Activations of SAELens, saev or llamascopium, or delphi's latents.")],
    out: Annotated[Path, typer.Option(help="The activation store to write or continue; of latents, the run folder.")],
    option: Annotated[
        list[str] | None, typer.Option(help="What the files do not say, as name=value, such as layer=11. Repeatable.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="How many activations, such as 2M; all when left out.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="int8 stores rows in half the space, a little less exactly.", metavar="int8")
    ] = None,
    dictionary: Annotated[
        str | None, typer.Option(help="Of latents: the run or checkpoint that they came from.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Of activations: the model's name. Of latents: the model, to show tokens as text."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="The format, where the content does not tell.")] = None,
) -> None:
    """Turn another library's stored activations into an activation store, or its latents into a run to open.

    For example: unweave import-store cached_activations --out activations

    An interrupted import of activations continues with the same command. `unweave inspect FOLDER` says what is there.
    """
    from unweave.config import apply_overrides
    from unweave.runs import Run
    from unweave.workflows.stores import import_store as read

    made = read(
        folder,
        out,
        format=format,
        n_rows=count(tokens) if tokens else None,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        dictionary=dictionary,
        model=model,
        options=apply_overrides({}, option or []),
        say=say,
    )
    then = f"look at it with: unweave open {out}"
    if not isinstance(made, Run):
        then = f"train on it with: unweave.fit(unweave.ActivationStore.open({str(out)!r}), folder='run')"
    say(f"{made!r}\n{then}")
