"""From a run, or any library's checkpoint, to another library's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from unweave import formats
from unweave.formats import Facts
from unweave.runs import Run, load


def convert(
    thing: str | Path,
    to: str,
    out: str | Path,
    *,
    model: str | None = None,
    site: str | None = None,
    target_site: str | None = None,
    **options: Any,
) -> Facts:
    """Write a dictionary in the format ``to``, with what is known of its model and site.

    Args:
        thing: a run folder, or whatever :func:`unweave.load` reads. out: a new folder.
        model, site, target_site: where it belongs, if nothing says it or what says it is wrong.
        options: what else the files of ``thing`` do not say.

    Returns:
        Facts: of what was written.

    Raises:
        UnweaveError: when it cannot be read, or the format cannot express it.
    """
    formats.get(to)  # a misspelt format is told before anything is read
    opened = load(thing, **options)
    if isinstance(opened, Run):
        dictionary, facts = opened.dictionary, facts_of_run(opened)
    else:
        dictionary, facts = opened, formats.inspect(thing, **options)
    said = {"model": model, "site": site, "target_site": target_site}
    facts = replace(facts, **{name: value for name, value in said.items() if value is not None})
    if site is not None or target_site is not None:
        facts = replace(facts, hook=None)  # the name of the site that the files gave
    folder = formats.write(dictionary, to, out, facts)
    return formats.inspect(folder)


def facts_of_run(run: Run) -> Facts:
    """What a run knows of the model and site of its dictionary."""
    known = Facts("unweave", run.dictionary.name)
    if not run.recipe:
        return known
    source = run.recipe["source"]
    return replace(known, model=run.recipe["model"]["name"], site=source["site"], target_site=source.get("target_site"))
