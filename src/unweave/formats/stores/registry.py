"""Stores of other libraries by name: recognised by their content, opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from unweave.errors import UnweaveError, near_names
from unweave.formats.stores._base import ForeignStore

S = TypeVar("S", bound="type[ForeignStore]")
_STORES: dict[str, type[ForeignStore]] = {}


def register(name: str) -> Any:
    """Class decorator: make a kind of store known under ``name``."""

    def add(kind: S) -> S:
        kind.name = name
        _STORES[name] = kind
        return kind

    return add


def names() -> list[str]:
    return sorted(_STORES)


def recognised(folder: str | Path) -> str | None:
    """The name of the format of a folder, or None; never raises."""
    return next((name for name in names() if _STORES[name].recognise(Path(folder))), None)


def open_store(folder: str | Path, /, *, format: str | None = None, **options: Any) -> ForeignStore:
    """A store of another library; settings and headers are read and checked, no values yet.

    Args:
        folder: that holds the files. format: which one it is, where its content does not tell.
        options: what its files do not say, such as ``model``; each format has its own.

    Returns:
        ForeignRows, a :class:`~unweave.sources.Source`, for activations; Latents for codes.

    Raises:
        UnweaveError: when nothing is recognised, or files are missing, cut short or do not fit together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UnweaveError(f"no folder at {folder}: give one that holds another library's stored activations or codes")
    if format is not None and format not in _STORES:
        raise UnweaveError(f"no format {format!r} of stores: {near_names(format, names(), 20)}")
    name = format or recognised(folder)
    if name is None:
        raise UnweaveError(
            f"{folder} holds no store in a format that unweave knows ({', '.join(names())}): found "
            f"{', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}{_nearby(folder)}"
        )
    return _STORES[name](folder, options)


def _nearby(folder: Path) -> str:
    """Where the stores are, if the user named a folder above them."""
    below = sorted(p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.is_dir())[:200]
    found = [p.relative_to(folder).as_posix() for p in below if recognised(p)]
    return f". Stores lie below it: name one of {', '.join(found[:8])}" if found else ""
