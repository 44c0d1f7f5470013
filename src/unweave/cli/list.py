"""``unweave list``"""

from __future__ import annotations

import json as json_text
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from unweave.cli._say import say

if TYPE_CHECKING:
    from unweave.formats.catalogue import Entry

SHOWN = 50


def list_verb(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATTERN]...",
            help='Words that must all fit: "*gemma*12b*", transcoder, layer=12, k=50. Without: the repositories.',
        ),
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the hub what the repositories hold now.")] = False,
    json: Annotated[bool, typer.Option("--json", help="All there is to know about each, as JSON.")] = False,
    limit: Annotated[
        int | None, typer.Option(help=f"How many to show, 0 for all. {SHOWN} unless --json.", min=0)
    ] = None,
) -> None:
    """List dictionaries on the hub by what their names say; a NAME goes into `unweave inspect NAME` or `unweave.load`.

    Works offline, from a snapshot or the last refresh. No weights were looked at: what a name does not say is unknown.
    """
    from unweave.errors import UnweaveError
    from unweave.formats import catalogue

    if refresh:
        done = catalogue.refresh()
        for reason in done.failed.values():
            say(f"not listed, what was known of it is kept: {reason}")
        say(f"the hub listed {done.listed} repositories")
    found = catalogue.list_dictionaries(*patterns or [])
    if not found:
        raise UnweaveError(f"no dictionary fits {' '.join(patterns or [])}: {catalogue.near(patterns or [])}")
    shown = found[: (len(found) if json else SHOWN) if limit is None else limit or len(found)]
    if json:
        typer.echo(json_text.dumps([entry.to_dict() for entry in shown], indent=1, ensure_ascii=False))
        return
    if patterns:
        _print(["name", "width", "L0", "k", "site", "model", "format"], 4, [_row(entry) for entry in shown])
    else:
        held = Counter((entry.repository, entry.format, entry.model) for entry in found)
        rows = [(name, f"{n:,}", model or "-", format) for (name, format, model), n in held.items()]
        _print(["repository", "dictionaries", "model", "format"], 2, rows)
    _closing(found, len(shown) if patterns else len(found), [] if patterns else catalogue.unlisted())


def _row(entry: Entry) -> tuple[str, ...]:
    site = entry.site or (f"→{entry.target_site}" if entry.target_site else "-")
    numbers = ("-" if value is None else f"{value:,}" for value in (entry.width, entry.l0, entry.k))
    return (entry.name, *numbers, site, entry.model or "-", entry.format)


def _print(names: list[str], n_whole: int, rows: list[tuple[str, ...]]) -> None:
    """The first columns stay whole, names to be copied and numbers; the others are cut to the terminal.

    What is piped is not cut at all.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(names):
        whole = max(len(row[i]) for row in [tuple(names), *rows]) if i < n_whole else None
        table.add_column(name, no_wrap=i < n_whole, overflow="ellipsis", min_width=whole, max_width=whole)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 1000, highlight=False, markup=False).print(table)


def _closing(found: list[Entry], n_shown: int, unlisted: list[str]) -> None:
    repositories = len({entry.repository for entry in found})
    held = f"{len(found):,} {'dictionary' if len(found) == 1 else 'dictionaries'}"
    place = f"{repositories} {'repository' if repositories == 1 else 'repositories'}"
    say(f"{held} in {place}, listed by {_sources(found)}; - is unknown")
    if n_shown < len(found):
        say(f"{n_shown} of them are shown: --limit 0 shows all")
    if unlisted:
        say(f"known besides, but not listed yet: {', '.join(unlisted)}; `unweave list --refresh` asks the hub")


def _sources(found: list[Entry]) -> str:
    listed = Counter(entry.listed for entry in found)
    return ", ".join(f"{source} ({n:,})" if len(listed) > 1 else source for source, n in listed.most_common(3))
