"""Entries by pattern, and by their short names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from unweave.errors import UnweaveError, near_names
from unweave.formats.catalogue.entry import FACTS, KNOWN, Entry, Lists
from unweave.formats.catalogue.listings import Listing, listings
from unweave.formats.catalogue.paths import natural


@dataclass(frozen=True)
class _Made:
    """Entries, by their names and hub ids in small letters too, and the listings they were made of."""

    listings: dict[str, Listing]
    entries: list[Entry]
    called: dict[str, Entry]


_made = _Made({}, [], {})


def entries() -> list[Entry]:
    """Every dictionary of the catalogue, by format and repository.

    Raises:
        UnweaveError: when the cached listing is damaged.
    """
    return list(_all().entries)


def _all() -> _Made:
    global _made
    held = listings()
    if held is not _made.listings:
        found: dict[str, Entry] = {}
        for kind in KNOWN.values():
            for repository in kind.repositories:
                if repository in held:
                    found |= {entry.name: entry for entry in _of(kind, repository, held[repository])}
        called = {name.casefold(): entry for entry in found.values() for name in (entry.hub_id, entry.name)}
        _made = _Made(held, list(found.values()), called)
    return _made


def _of(kind: Lists, repository: str, listing: Listing) -> Iterator[Entry]:
    model = kind.repositories[repository]
    for file in listing.files:
        entry = kind.named(repository, file)
        if entry is None:
            continue
        if entry.model is None and model is not None:
            entry = replace(entry, model=model, declared=("model", *entry.declared))
        options = {**entry.options, **listing.options.get(entry.place, {})}
        yield replace(entry, options=options, revision=listing.revision, listed=listing.listed)


def unlisted() -> list[str]:
    """Repositories that formats know, but whose files nobody has listed yet."""
    held = listings()
    return sorted(repository for kind in KNOWN.values() for repository in kind.repositories if repository not in held)


def list_dictionaries(*patterns: str) -> list[Entry]:
    """The dictionaries on the hub that all patterns fit, from the package's snapshot or the last refresh; offline.

    Args:
        patterns: any number of words, all of which must fit, whatever their case. ``layer=12`` is one fact: of model,
            site, target_site, layer, width, l0, k and format, or ``unknown``. Other words are looked for in names,
            models and sites: with ``*`` they stand for the whole of it (``*gemma*12b*``), without for a part of it.

    Returns:
        list[Entry]: their names go into :func:`unweave.load` and ``unweave inspect``. No weights were looked at.

    Raises:
        UnweaveError: for a fact of another name, or when the cached listing is damaged.
    """
    words = [word.casefold() for pattern in patterns for word in pattern.split()]
    for word in words:
        fact, is_fact, _ = word.partition("=")
        if is_fact and fact not in (*FACTS, "format"):
            raise UnweaveError(f"no fact {fact!r}, as in {word!r}: {near_names(fact, [*FACTS, 'format'], 8)}")
    return [entry for entry in entries() if all(_fits(word, entry) for word in words)]


def _fits(word: str, entry: Entry) -> bool:
    fact, is_fact, wanted = word.partition("=")
    if is_fact:
        return fnmatchcase(_value(entry, fact), wanted)
    said = (entry.hub_id, entry.name, entry.format, entry.model, entry.site, entry.target_site)
    if "*" in word:
        return any(fnmatchcase(text.casefold(), word) for text in said if text)
    return any(word in text.casefold() for text in said if text)


def _value(entry: Entry, fact: str) -> str:
    value = getattr(entry, fact)
    return "unknown" if value is None else str(value).casefold()


def near(patterns: list[str]) -> str:
    """What may have been meant by patterns that nothing fits."""
    words = [word.casefold() for pattern in patterns for word in pattern.split()]
    strange = next((word for word in words if not list_dictionaries(word)), None)
    if strange is None:
        return "each of the words fits some, no dictionary fits all of them"
    fact, is_fact, wanted = strange.partition("=")
    known: set[str] = set()
    for entry in entries():
        if is_fact:
            known.add(_value(entry, fact))
        else:
            said = (entry.repository.partition("/")[2], entry.format, entry.model or "")
            known |= {part.casefold() for text in said for part in (text, *re.split("[-_/]", text)) if part}
    hint = near_names((wanted if is_fact else strange).strip("*"), sorted(known, key=natural))
    return f"{strange!r} fits none: {hint}"


def find(name: str) -> Entry | None:
    """The entry of a short name or a hub id, whatever its case; None if the catalogue has none.

    Raises:
        UnweaveError: when the name begins like one of the catalogue's and goes on like none.
    """
    wanted = name.casefold().removeprefix("hf://").rstrip("/")
    called = _all().called
    if wanted in called:
        return called[wanted]
    first, slash, _ = wanted.partition("/")
    beside = [entry.name for entry in entries() if slash and entry.name.casefold().startswith(f"{first}/")]
    if beside:
        raise UnweaveError(
            f"nothing is at {name}, and the catalogue has no such dictionary: {near_names(name, beside)} "
            "`unweave list` shows them all; what was added since is found by its hub id, owner/repository/folder"
        )
    return None


def resolve(thing: str | Path, options: dict[str, Any]) -> tuple[str | Path, dict[str, Any]]:
    """What the catalogue knows by a name: its hub id, and the options its files do not say; anything else as it is.

    Raises:
        UnweaveError: when the name begins like one of the catalogue's and goes on like none.
    """
    if isinstance(thing, Path) or any(path.exists() for path in (Path(thing), *Path(thing).parents[:-1])):
        return thing, options
    entry = find(thing)
    return (thing, options) if entry is None else (entry.hub_id, {**entry.options, **options})
