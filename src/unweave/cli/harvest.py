"""``unweave harvest``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import count, read_recipe, say


def harvest(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe file and overrides.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or folder with a .gguf file.")] = None,
    against: Annotated[
        str | None, typer.Option(help="A second model of the same tokenizer, to compare with: for a crosscoder.")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Where to read, such as layers.12, or layers.6+layers.12 in one row. Given several times: a store for "
            "each, from one pass."
        ),
    ] = None,
    target_site: Annotated[str | None, typer.Option(help="A second site, the target of a transcoder.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Hub dataset, or .txt/.jsonl/.parquet/.csv file or folder. Dialogues: data.format=chat"),
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="The field that holds the text.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Activations to collect, such as 2M.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="int8 stores rows in half the space, a little less exactly.", metavar="int8")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="The folder of the store, new or unfinished; of several stores, the folder around them."),
    ] = Path("activations"),
) -> None:
    """Write a model's activations to disk, to train several dictionaries from them.

    For example: unweave harvest --model HuggingFaceTB/SmolLM2-135M --site layers.12 --data notes.jsonl --tokens 2M

    An interrupted harvest continues with the same command; asking for more tokens later extends the store. Several
    --site options write OUT/layers.6, OUT/layers.12, ..., each as if harvested alone.
    """
    from unweave.workflows import harvest_only, harvest_sites

    recipe = read_recipe(
        settings,
        model__name=model,
        against__name=against,
        data__documents=data,
        data__text_field=text_field,
        source__site=site[0] if site else None,
        source__target_site=target_site,
        source__tokens=count(tokens) if tokens else None,
        source__dtype=dtype,
    )
    if site and len(site) > 1:
        for store in harvest_sites(recipe, site, out, say).values():
            say(f"{store!r}\ntrain from it with: unweave train --store {store.folder}")
        return
    store = harvest_only(recipe, out, say)
    say(f"{store!r}\ntrain from it with: unweave train --store {out}")
