"""``unweave train``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import count, read_recipe, say, show


def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml] [KEY=VALUE]...",
            help="A recipe file, and overrides of any field: training.lr=1e-4 dictionary.options.threshold_rate=0.02",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or folder with a .gguf file.")] = None,
    against: Annotated[
        str | None, typer.Option(help="A second model of the same tokenizer, to compare with: for a crosscoder.")
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(help="layers.12, layers.12:input, layers.12.mlp, ...; joined: layers.6+layers.12"),
    ] = None,
    target_site: Annotated[str | None, typer.Option(help="Reconstruct this site instead (a transcoder).")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Hub dataset, or .txt/.jsonl/.parquet/.csv file or folder. Dialogues: data.format=chat"),
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="The field that holds the text.")] = None,
    store: Annotated[Path | None, typer.Option(help="Train from activations that `unweave harvest` stored.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Activations to collect, such as 2M.")] = None,
    arch: Annotated[str | None, typer.Option(help="The architecture; `unweave archs` lists them.")] = None,
    expansion: Annotated[float | None, typer.Option(help="Features per input dimension.")] = None,
    n_features: Annotated[int | None, typer.Option(help="Number of features, instead of --expansion.")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Go on from this run's dictionary, on its model, site and text.")
    ] = None,
    k: Annotated[
        float | None, typer.Option(help="Features that fire per token (k, or the target L0 of JumpReLU).")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="mse of the rows; or end to end, through the model: kl to its predictions, ce of the text."),
    ] = None,
    passes: Annotated[float | None, typer.Option(help="How often to go over the activations.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; each architecture has a default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random in training.")] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--store-activations", help="Make activations on the fly.")
    ] = None,
    track: Annotated[list[str] | None, typer.Option(help="Also log to wandb or tensorboard.")] = None,
    out: Annotated[Path, typer.Option(help="The run folder to write, or to continue.")] = Path("run"),
    skip_eval: Annotated[bool, typer.Option("--no-eval", help="Do not evaluate at the end.")] = False,
    skip_index: Annotated[bool, typer.Option("--no-index", help="Do not build the feature store at the end.")] = False,
) -> None:
    """Train a dictionary on a model's activations, evaluate it and index its features.

    For example: unweave train --model HuggingFaceTB/SmolLM2-135M --site layers.12 --data notes.jsonl --k 64

    The run folder holds everything; the same command continues a run that was interrupted.
    """
    from unweave.dictionaries import get
    from unweave.workflows import Pipeline

    recipe = read_recipe(
        settings,
        model__name=model,
        against__name=against,
        data__documents=data,
        data__text_field=text_field,
        source__site=site,
        source__target_site=target_site,
        source__tokens=count(tokens) if tokens else None,
        source__stream=stream,
        store=str(store) if store else None,
        trackers=track,
        dictionary__start=str(start) if start else None,
        dictionary__arch=arch,
        dictionary__expansion=expansion,
        dictionary__n_features=n_features,
        training__objective=objective,
        training__passes=passes,
        training__lr=lr,
        training__seed=seed,
    )
    if k is not None:
        option = get(recipe.dictionary.arch).sparsity_option(k)
        options = {**{o: v for o, v in recipe.dictionary.options.items() if o not in ("k", "target_l0")}, **option}
        recipe = recipe.replace(dictionary=recipe.dictionary.replace(options=options))
    if skip_eval:
        recipe = recipe.replace(evaluation=None)
    if skip_index:
        recipe = recipe.replace(index=None)
    pipeline = Pipeline(recipe, out, say)
    if (evaluation := pipeline.run()) is not None:
        show(evaluation.table())
    say(f"\nrun written to {out}. Look at it with: unweave open {out}")
