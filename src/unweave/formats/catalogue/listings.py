"""Which files the known repositories hold: a snapshot in the package, and the hub's own answer once it was asked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from unweave.errors import UnweaveError
from unweave.files import cache_dir, read_json, write_json
from unweave.formats.catalogue.entry import KNOWN
from unweave.formats.catalogue.online import NotListed, list_files
from unweave.formats.catalogue.paths import compress, expand, natural
from unweave.progress import track

SNAPSHOT = Path(__file__).parent / "snapshot.json"
VERSION = 1
_ORDINARY = re.compile(r"(?!.*\.\.)[\w.=+:-]+(/[\w.=+:-]+)*")


@dataclass(frozen=True)
class Listing:
    """The files of one repository.

    Attributes:
        files: their paths. listed: by whom and when. revision: of the repository, None if unknown.
        options: by place in the repository, what loading it needs and its files do not say.
    """

    files: tuple[str, ...]
    listed: str
    revision: str | None = None
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Refreshed:
    """What a refresh found: how many repositories were listed, and why others were not."""

    listed: int
    failed: dict[str, str]


def cache() -> Path:
    return cache_dir() / "catalogue.json"


def listings() -> dict[str, Listing]:
    """By repository: what the hub said last, and of what it was not asked what the snapshot says.

    Raises:
        UnweaveError: when the cached listing is damaged.
    """
    path = cache()
    return _listings(path, path.stat().st_mtime_ns if path.is_file() else None)


@lru_cache(maxsize=1)
def _listings(path: Path, changed: int | None) -> dict[str, Listing]:
    snapshot = _read(SNAPSHOT)
    records = snapshot["repositories"] | (_read(path)["repositories"] if changed is not None else {})
    return {
        repository: Listing(
            tuple(sorted((file for pattern in record["files"] for file in expand(pattern)), key=natural)),
            record.get("listed", snapshot["listed"]),
            record.get("revision"),
            _options(snapshot["options"].get(repository, {})),
        )
        for repository, record in records.items()
    }


def _options(record: dict[str, dict[str, list[Any]]]) -> dict[str, dict[str, Any]]:
    """``{option: {pattern: values}}`` by place, a value for each place that the pattern stands for."""
    options: dict[str, dict[str, Any]] = {}
    for option, patterns in record.items():
        for pattern, values in patterns.items():
            for place, value in zip(expand(pattern), values, strict=True):
                options.setdefault(place, {})[option] = value
    return options


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path)
    records = values.get("repositories") if isinstance(values, dict) and values.get("version") == VERSION else None
    if not isinstance(records, dict) or not all(_is_record(record) for record in records.values()):
        raise UnweaveError(
            f"{path} is no listing of version {VERSION}: delete it, or make it again with `unweave list --refresh`"
        )
    return values


def _is_record(record: Any) -> bool:
    files = record.get("files") if isinstance(record, dict) else None
    return isinstance(files, list) and all(isinstance(file, str) for file in files)


def refresh() -> Refreshed:
    """Ask the hub for the files of every known repository, and keep the answer in the user's cache folder.

    What could not be listed (gone, gated, renamed) keeps what was known of it before.

    Raises:
        UnweaveError: when the hub cannot be reached or lists nothing; what was cached before is kept as it is.
    """
    path = cache()
    try:
        before = _read(path)["repositories"]
    except UnweaveError:  # there is none, or it is damaged
        before = {}
    records: dict[str, Any] = {}
    failed: dict[str, str] = {}
    known = [(kind, repository) for kind in KNOWN.values() for repository in kind.repositories]
    with track(len(known), "listing", "repositories") as bar:
        for kind, repository in known:
            try:
                revision, files = list_files(repository)
            except NotListed as error:
                failed[repository] = str(error)
                records |= {repository: before[repository]} if repository in before else {}
            else:
                # Pictures, settings and training states are not kept, nor names that are no name to load.
                held = compress(file for file in files if _ORDINARY.fullmatch(file) and kind.named(repository, file))
                records[repository] = {"listed": f"the hub, {today()}", "revision": revision, "files": held}
            bar.advance()
    if len(failed) == len(known):
        raise UnweaveError(f"the hub lists none of the {len(known)} known repositories: {next(iter(failed.values()))}")
    write_json(path, {"version": VERSION, "repositories": records})
    return Refreshed(len(known) - len(failed), failed)


def today() -> str:
    return datetime.now(UTC).date().isoformat()
