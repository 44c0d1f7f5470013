"""Lines for the user, and the options several verbs share."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

    from unweave.runs.recipe import Recipe

RunFolder = Annotated[Path, typer.Argument(help="A run folder, as `unweave train` or `unweave demo` writes it.")]


def say(line: str) -> None:
    """A line about progress, on the error stream so that results can be piped."""
    typer.echo(line, err=True)


def show(renderable: RenderableType) -> None:
    """A table or text of results, on the output stream."""
    from rich.console import Console

    Console().print(renderable)


def count(text: str, least: int = 1) -> int:
    """``500k``, ``1.5M`` or ``500000`` as a number."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
    cleaned = text.strip().lower().replace("_", "").replace(",", "")
    unit = units.get(cleaned[-1:], 1.0)
    try:
        number = float(cleaned.rstrip("kmbg")) * unit
    except ValueError:
        raise typer.BadParameter(f"expected a number such as 500k or 2M, found {text!r}") from None
    if not (math.isfinite(number) and number >= least):
        raise typer.BadParameter(f"expected at least {least}, found {text!r}")
    return round(number)


def read_recipe(settings: list[str] | None, **options: Any) -> Recipe:
    """The recipe that a verb's arguments describe: a file, the options named, then ``key=value`` overrides."""
    from unweave.runs.recipe import Recipe

    files = [setting for setting in settings or [] if "=" not in setting]
    if len(files) > 1:
        raise typer.BadParameter(f"expected one recipe file, found {', '.join(files)}")
    overrides = [setting for setting in settings or [] if "=" in setting]
    return Recipe.read(files[0] if files else None, given(**options), overrides)


def file_options(pairs: list[str] | None, *calls: Callable[..., Any]) -> dict[str, Any]:
    """What ``--option name=value`` says of a checkpoint's files, to be passed on by ``calls`` as keywords."""
    from unweave.config import apply_overrides
    from unweave.errors import UnweaveError

    options = apply_overrides({}, pairs or [])
    for name in options.keys() & {name for call in calls for name in signature(call).parameters}:
        raise UnweaveError(f"--option {name}: files have no such option; --help lists what the verb itself takes")
    return options


def given(**values: Any) -> dict[str, Any]:
    """Only what the user named, in groups: ``given(source__site="layers.3")`` is ``{"source": {"site": ...}}``."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        if value is None:
            continue
        *groups, key = path.split("__")
        node = nested
        for group in groups:
            node = node.setdefault(group, {})
        node[key] = value
    return nested
