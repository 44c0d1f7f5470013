"""``unweave push``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import file_options, say


def push(
    thing: Annotated[str, typer.Argument(help="A run, or a checkpoint of any library that `unweave inspect` knows.")],
    repository: Annotated[
        str | None, typer.Argument(help="owner/name on the Hugging Face hub, made if need be.")
    ] = None,
    folder: Annotated[str, typer.Option(help="Where in the repository; its root when left out.")] = "",
    format: Annotated[str, typer.Option(help="In which library's format, such as saelens.")] = "unweave",
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    meta: Annotated[
        list[str] | None, typer.Option(help="For the card's front matter, as name=value: license=mit. Repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="What the files do not say, as name=value, such as k=32. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the folder here and push nothing.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on where the repository holds files already.")] = False,
) -> None:
    """Put a dictionary on the hub, with a model card whose numbers were measured; or only write that folder."""
    from unweave.config import apply_overrides
    from unweave.formats import check_place
    from unweave.workflows import publishing

    options = file_options(option, publishing.prepare, publishing.push)
    options |= {"format": format, "front_matter": apply_overrides({}, meta or [])}
    place = repository or "owner/name"
    load_as = "/".join(part for part in (place, folder) if part)
    if out is not None:
        check_place(place, folder)
        publishing.prepare(thing, out, load_as=load_as, **options)
        rest = (f" --folder {folder}" if folder else "") + (" --private" if private else "")
        say(f"wrote {out}: read its README.md, then push it with: unweave push {out} {place}{rest}")
    elif repository is None:
        raise typer.BadParameter("name a repository (owner/name) to push to, or a new folder with --out")
    else:
        url = publishing.push(thing, repository, folder=folder, private=private, force=force, **options)
        say(f"pushed to {url}\nload it with: unweave.load({load_as!r})")
