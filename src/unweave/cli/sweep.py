"""``unweave sweep``"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from unweave.cli._say import count, read_recipe, say, show


def sweep(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe file, and overrides of any field."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or folder with a .gguf file.")] = None,
    site: Annotated[str | None, typer.Option(help="Where to read activations, such as layers.12.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Hub dataset, or .txt/.jsonl/.parquet/.csv file or folder. Dialogues: data.format=chat"),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Activations that `unweave harvest` stored.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Activations to collect, such as 2M.")] = None,
    passes: Annotated[float | None, typer.Option(help="How often to go over the activations.")] = None,
    stream: Annotated[bool | None, typer.Option("--stream", help="Make activations on the fly.")] = None,
    arch: Annotated[str | None, typer.Option(help="Architectures to try: topk,batch_topk")] = None,
    n_features: Annotated[str | None, typer.Option(help="Numbers of features to try: 4608,9216")] = None,
    k: Annotated[str | None, typer.Option(help="Features per token to try: 16,32,64")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rates to try: 3e-4,1e-3")] = None,
    seed: Annotated[str | None, typer.Option(help="Seeds of the first weights to try: 0,1,2")] = None,
    out: Annotated[Path, typer.Option(help="The folder that gets a run folder per combination.")] = Path("sweep"),
) -> None:
    """Train a grid of dictionaries on one stream of activations, each as if it were alone.

    For example: unweave sweep --store activations --arch topk,batch_topk --k 16,32,64 --out sweep

    The rows are made, read and shuffled once for all. Every member is a run folder: `unweave eval sweep/NAME`.
    """
    from rich.table import Table

    from unweave.workflows.sweep import sweep as run_sweep

    recipe = read_recipe(
        settings,
        model__name=model,
        data__documents=data,
        source__site=site,
        source__tokens=count(tokens) if tokens else None,
        source__stream=stream,
        store=str(store) if store else None,
        training__passes=passes,
    )
    axes = {
        "arch": arch.split(",") if arch else [],
        "n_features": [count(text) for text in n_features.split(",")] if n_features else [],
        "k": _numbers("--k", k),
        "lr": _numbers("--lr", lr),
        "seed": _numbers("--seed", seed, int),
    }
    trained = run_sweep(recipe, {axis: values for axis, values in axes.items() if values}, out, say)
    table = Table("run", "FVU in training", "L0", "dead")
    for name, result in sorted(trained.items(), key=lambda item: item[1].metrics[-1]["fvu"] or float("inf")):
        last = result.metrics[-1]
        table.add_row(
            name, "-" if last["fvu"] is None else f"{last['fvu']:.4f}", f"{last['l0']:.1f}", f"{last['dead_share']:.1%}"
        )
    show(table)
    say(f"\n{len(trained)} runs written to {out}. Measure one on held-out text with: unweave eval {out}/NAME")


def _numbers(option: str, text: str | None, kind: Callable[[str], Any] = float) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"{option}: expected {what} separated by commas, found {text!r}") from None
