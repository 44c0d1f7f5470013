"""Activations written to disk for training several dictionaries from them, and for a pipeline's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.errors import UnweaveError
from unweave.runs.opening import open_against, open_documents, open_model, open_sites, open_source
from unweave.runs.recipe import Recipe

if TYPE_CHECKING:
    from unweave.activations import ActivationStore
    from unweave.sources import JoinedSource, TextSource

Say = Callable[[str], None]


def harvest_only(recipe: Recipe, folder: str | Path, say: Say = print) -> ActivationStore:
    """Write an ActivationStore and nothing else, for training several dictionaries from it."""
    model = open_model(recipe)
    documents = open_documents(recipe)
    say(f"text: {documents.describe()}")
    source = open_source(recipe, model, documents, against=open_against(recipe, model))
    return fill_store(recipe, source, Path(folder), say)


def harvest_sites(
    recipe: Recipe, sites: Sequence[str], folder: str | Path, say: Say = print
) -> dict[str, ActivationStore]:
    """Write a store for each of several sites from one pass of the model, in ``folder/SITE``.

    In the folders' names a colon becomes ``-`` and a star ``all``. Each store is the one that harvesting its site alone
    would make: train from any of them, continue it on its own, or name more sites later and run only those.
    """
    from unweave.activations import harvest

    folder = Path(folder)
    if (folder / "manifest.json").exists():
        raise UnweaveError(f"{folder} is a store itself: choose another folder for the stores of several sites")
    if recipe.against is not None:
        raise UnweaveError("two models are read at one site at a time: give one --site, or join sites with a plus")
    model = open_model(recipe)
    documents = open_documents(recipe)
    say(f"text: {documents.describe()}")
    group = open_sites(recipe, model, documents, sites)
    recipes = {site: recipe.replace(source=recipe.source.replace(site=site)) for site in sites}
    needed = 0
    for source in group.sources.values():
        say(f"site: {source.site.describe()}")
        needed += recipe.source.tokens * _row_bytes(recipe, source)
    check_space(folder, needed)
    return harvest(
        group,
        {site: folder / site.replace(":", "-").replace("*", "all") for site in sites},
        n_rows=recipe.source.tokens,
        dtype=recipe.source.dtype,
        provenance_extra={site: {"recipe": _source_of(made)} for site, made in recipes.items()},
    )


def fill_store(recipe: Recipe, source: TextSource | JoinedSource, folder: Path, say: Say) -> ActivationStore:
    """Harvest what a recipe asks for; the store remembers how its source is made."""
    from unweave.activations import harvest

    tokens = recipe.source.tokens
    check_space(folder, tokens * _row_bytes(recipe, source))
    read = getattr(source, "joined", [source])
    models = "" if len(read) == 1 else f", of {' and '.join(one.model.name for one in read)}"
    say(f"site: {read[0].site.describe()}{models}")
    extra = {"recipe": _source_of(recipe)}
    return harvest(source, folder, n_rows=tokens, dtype=recipe.source.dtype, provenance_extra=extra)


def _row_bytes(recipe: Recipe, source: TextSource | JoinedSource) -> int:
    """About what a row takes on disk, with its place, its token and (int8) its scale."""
    width = source.d_in + (source.d_out if recipe.source.target_site else 0)
    plain = 4 if recipe.model.dtype == "float32" else 2
    return width * (1 if recipe.source.dtype == "int8" else plain) + (source.d_side or 0) * plain + 16


def _source_of(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that decides the activations: how to make the same source again."""
    values = recipe.to_dict()
    for name in ("tokens", "stream", "dtype"):  # how many rows, and how they are kept: the store itself says it
        values["source"].pop(name)
    if values["source"]["side"] is None:
        del values["source"]["side"]  # as in the stores made before there were side inputs
    return {key: values[key] for key in ("model", "against", "data", "source") if values[key] is not None}


def check_space(folder: Path, n_bytes: int) -> None:
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    already = sum(f.stat().st_size for f in folder.rglob("shard-*.safetensors")) if folder.exists() else 0
    if n_bytes - already > free:
        raise UnweaveError(
            f"the activations would take {n_bytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free. "
            "Collect fewer with --tokens, choose another disk, or train on the fly with --stream."
        )
