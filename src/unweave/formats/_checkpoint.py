"""A file or folder as its formats see it: names first, settings and headers when asked for, values last."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from unweave.errors import UnweaveError
from unweave.formats.containers import Settings, Tensors, open_tensors, read_settings

_MANY = 10_000


class Files(Protocol):
    """How the files of a folder are read; ``remote`` ones are fetched for it, which takes time."""

    remote: bool

    def settings(self, path: Path) -> Settings: ...
    def tensors(self, path: Path) -> Tensors: ...
    def whole(self, path: Path) -> Path:
        """Where the file lies with all of its bytes."""
        ...


class LocalFiles:
    remote = False

    def settings(self, path: Path) -> Settings:
        return read_settings(path)

    def tensors(self, path: Path) -> Tensors:
        return open_tensors(path)

    def whole(self, path: Path) -> Path:
        return path


class Checkpoint:
    """What may hold one dictionary.

    Args:
        path: a folder, or a file (then the folder it lies in is looked at for its settings).
        called: what the user called it; names in it (of a layer, a width) are hints where a file says nothing.
        files: what reads them, where they do not lie here.
        known: what is known of it from elsewhere, for its card.
    """

    def __init__(
        self,
        path: str | Path,
        called: str | None = None,
        files: Files | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> None:
        path = Path(path)
        if not path.exists():
            raise UnweaveError(f"no file or folder at {path}")
        self.file = None if path.is_dir() else path
        self.folder = path if path.is_dir() else path.parent
        self.called = called or str(path.resolve())
        self.files, self.known = files or LocalFiles(), dict(known or {})
        self._settings: dict[str, Settings] = {}
        self._tensors: dict[str, Tensors] = {}

    def __repr__(self) -> str:
        return f"Checkpoint({self.called})"

    @cached_property
    def names(self) -> list[str]:
        """The files in it, one level deep; of a file its own name alone."""
        if self.file is not None:
            return [self.file.name]
        found = sorted(p.name for p in self.folder.iterdir() if p.is_file())
        return found[:_MANY]

    def find(self, *names: str) -> str | None:
        """The first of these that is there. For a file: only its own name counts."""
        return next((name for name in names if name in self.names), None)

    def beside(self, name: str) -> bool:
        """Whether a file of that name lies in the same folder."""
        return (self.folder / name).is_file()

    def settings(self, name: str) -> Settings:
        if name not in self._settings:
            self._settings[name] = self.files.settings(self.folder / name)
        return self._settings[name]

    def tensors(self, name: str) -> Tensors:
        if name not in self._tensors:
            self._tensors[name] = self.files.tensors(self.folder / name)
        return self._tensors[name]

    def whole(self, *names: str) -> Path:
        """A folder in which these files lie with all of their bytes, for readers that take a folder."""
        found = [self.files.whole(self.folder / name) for name in names]
        return found[0].parent

    def at(self, folder: Path) -> Checkpoint:
        """A folder (or file) near it, read the same way."""
        return Checkpoint(folder, files=self.files)

    def weights(self, *suffixes: str) -> str | None:
        """The one file of weights with such a suffix, for formats that do not fix its name; None if not exactly one."""
        found = [name for name in self.names if name.endswith(suffixes)]
        return found[0] if len(found) == 1 else None

    def keys(self, name: str | None) -> frozenset[str]:
        """The names of the tensors of a file, none if it cannot be read."""
        try:
            return frozenset(self.tensors(name)) if name else frozenset()
        except UnweaveError:
            return frozenset()

    def quiet_settings(self, name: str) -> Settings:
        """Settings for a guess: empty where the file is missing or broken."""
        try:
            return self.settings(name) if self.beside(name) else Settings({}, name)
        except UnweaveError:
            return Settings({}, name)
