"""``unweave eval``"""

from __future__ import annotations

from typing import Annotated

import typer

from unweave.cli._say import RunFolder, count, say, show


def evaluate(
    folder: RunFolder,
    tokens: Annotated[str | None, typer.Option(help="Held-out activations to measure on, such as 100k.")] = None,
    loss_tokens: Annotated[str | None, typer.Option(help="Tokens for the metrics that run the whole model.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on although the model is another one.")] = False,
) -> None:
    """Measure a run's dictionary on held-out text and print the table, baselines beside."""
    from unweave.runs.recipe import EvaluationRecipe, Recipe
    from unweave.workflows import Pipeline

    recipe = Recipe.of_run(folder)
    pipeline = Pipeline(recipe, folder, say)
    settings = recipe.evaluation or EvaluationRecipe()
    if tokens:
        settings = settings.replace(tokens=count(tokens))
    if loss_tokens:
        settings = settings.replace(loss_tokens=count(loss_tokens, least=0))
    show(pipeline.evaluate(settings, again=bool(tokens or loss_tokens) or force, force=force).table())
