"""``unweave index``"""

from __future__ import annotations

from typing import Annotated

import typer

from unweave.cli._say import RunFolder, count, say


def index(
    folder: RunFolder,
    tokens: Annotated[str | None, typer.Option(help="Activations to index, such as 1M.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Build it anew if it is there already.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go on although the model is another one.")] = False,
) -> None:
    """Build a run's feature store: contexts, histograms, neighbours and logits of every feature."""
    from unweave.runs.recipe import IndexRecipe, Recipe
    from unweave.workflows import Pipeline

    recipe = Recipe.of_run(folder)
    settings = recipe.index or IndexRecipe()
    if tokens:
        settings = settings.replace(tokens=count(tokens))
    features = Pipeline(recipe, folder, say).index(settings, again=again or bool(tokens), force=force)
    say(f"{features!r}\nlook at it with: unweave open {folder}")
