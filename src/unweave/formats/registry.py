"""Formats by name: recognise a checkpoint by its content, say what is known of it, read it, write one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError, near_names
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts, fold
from unweave.formats._hub import looks_like_hub_id, on_hub
from unweave.formats.catalogue import Entry, find, resolve
from unweave.formats.catalogue.entry import KNOWN
from unweave.formats.containers import is_archive, members, unpack

F = TypeVar("F", bound="type[Format]")
_FORMATS: dict[str, Format] = {}
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin")


class Format:
    """One library's files. A new format is one file: a subclass with ``recognise``, ``inspect`` and ``parts``.

    With ``repositories`` and ``named`` the catalogue lists what is on the hub of it.

    Attributes:
        title: whose it is. checked: against the library itself ("library"), or only its documented layout ("layout").
        options: what a user may say in ``load(x, ...)`` where the files do not, with a line of help each.
        repositories: those on the hub that are known to hold such files, and the model where no name says it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    checked: ClassVar[Literal["library", "layout"]] = "layout"
    options: ClassVar[dict[str, str]] = {}
    repositories: ClassVar[Mapping[str, str | None]] = {}

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        """How sure it is, from 0 to 1, that a checkpoint is of this format; None for no. Never raises."""
        raise NotImplementedError

    def inspect(self, checkpoint: Checkpoint, **options: Any) -> Facts:
        """What headers and settings say."""
        raise NotImplementedError

    def parts(self, checkpoint: Checkpoint, **options: Any) -> Parts | Dictionary:
        """The weights, and what the library does around them; of what is no one linear layer, the whole dictionary."""
        raise NotImplementedError

    def read(self, checkpoint: Checkpoint, **options: Any) -> Dictionary:
        made = self.parts(checkpoint, **options)
        return fold(made) if isinstance(made, Parts) else made.eval()

    def named(self, repository: str, file: str) -> Entry | None:
        """What the names of a known repository and of a file in it say of a dictionary; None if it holds none."""
        return None

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        """Write what the library loads.

        Raises:
            UnweaveError: when the format cannot express the dictionary.
        """
        raise UnweaveError(f"unweave reads {self.title}, it does not write it; it writes {', '.join(writable())}")


def register(name: str) -> Any:
    """Class decorator: make a format known under ``name``."""

    def add(kind: F) -> F:
        kind.name = name
        _FORMATS[name] = kind()  # pyright: ignore[reportArgumentType]
        KNOWN[name] = _FORMATS[name]
        return kind

    return add


def names() -> list[str]:
    return sorted(_FORMATS)


def writable() -> list[str]:
    return [name for name in names() if type(_FORMATS[name]).write is not Format.write]


def get(name: str) -> Format:
    if name not in _FORMATS:
        raise UnweaveError(f"no format {name!r}: {near_names(name, names(), 20)}")
    return _FORMATS[name]


def lacking(architecture: str, what: str) -> str:
    """The words for a checkpoint that needs an architecture which unweave does not make of such files."""
    return f"{what} needs the architecture {architecture!r}, which unweave does not load from such files yet"


def recognise(checkpoint: Checkpoint) -> Format:
    """The format of a checkpoint, from its content.

    Raises:
        UnweaveError: when none fits, with what was found; when several fit equally well.
    """
    fits = {name: confidence for name in names() if (confidence := _FORMATS[name].recognise(checkpoint))}
    if not fits:
        found = ", ".join(checkpoint.names[:8]) or "no files"
        for name in checkpoint.names[:64]:  # a file that is broken is why nothing fits: say so
            if name.endswith(SUFFIXES):
                found += f"; {name} holds {', '.join(sorted(checkpoint.tensors(name))[:8])}"
                break
        raise UnweaveError(
            f"{checkpoint.called} holds no dictionary in a format that unweave knows ({', '.join(names())}): "
            f"found {found}{_nearby(checkpoint)}"
        )
    best = max(fits.values())
    first = [name for name, confidence in fits.items() if confidence == best]
    if len(first) > 1:
        raise UnweaveError(f"{checkpoint.called} may be {' or '.join(first)}: say which, with format=")
    return _FORMATS[first[0]]


def recognised(thing: str | Path) -> str | None:
    """The name of the format of a folder, file or hub id, or None; never raises."""
    try:
        with opened(thing) as checkpoint:
            return recognise(checkpoint).name
    except UnweaveError:
        return None


def holds_weights(thing: str | Path) -> bool:
    """Whether it is worth asking for a checkpoint there: a file or folder of tensors, a hub id, a catalogue's name."""
    path = Path(thing)
    if path.is_dir():
        return any(p.suffix in SUFFIXES for pattern in ("*", "*/*") for p in path.glob(pattern))
    if path.is_file():
        return path.suffix in SUFFIXES or is_archive(path)
    in_archive = any(p.is_file() for p in path.parents)
    return in_archive or (isinstance(thing, str) and (looks_like_hub_id(thing) or find(thing) is not None))


@contextmanager
def opened(thing: str | Path) -> Iterator[Checkpoint]:
    """A checkpoint by its path, which may lead into a zip (``dictionaries.zip/pythia/layer0``), or by its hub id.

    Of what is on the hub only the headers and settings that are looked at are fetched, until a value is read.
    """
    path = Path(thing)
    if path.exists() and not (path.is_file() and is_archive(path) and _is_bundle(path)):
        yield Checkpoint(path)
        return
    archive = next((p for p in (path, *path.parents) if p.is_file() and is_archive(p)), None)
    if archive is None:
        if not looks_like_hub_id(str(thing)):
            raise UnweaveError(f"no file or folder at {path}")
        with on_hub(str(thing)) as checkpoint:
            yield checkpoint
        return
    inside = path.relative_to(archive).as_posix().removeprefix(".")
    with tempfile.TemporaryDirectory(prefix="unweave-") as place:
        unpack(archive, Path(place), inside)
        root = Path(place) / inside
        while not inside and root.is_dir() and len(list(root.iterdir())) == 1:
            root = next(root.iterdir())  # a folder in a folder in the archive
        if not root.exists():
            raise UnweaveError(f"{archive} has no {inside!r} in it")
        yield Checkpoint(root, str(path))


def _is_bundle(path: Path) -> bool:
    """Whether a zip is a folder packed up, rather than itself a file of tensors (.npz and .pt are zips too)."""
    found = [m.filename for m in members(path)]
    return not any(n.rpartition("/")[2] == "data.pkl" for n in found) and not all(n.endswith(".npy") for n in found)


def load(thing: str | Path, *, format: str | None = None, **options: Any) -> Dictionary:
    """A dictionary out of another library's checkpoint (or unweave's own), for raw activation rows.

    Args:
        thing: a folder, a file, a path into a zip archive, a hub id (``owner/repository[@revision][/folder]``), or a
            name that :func:`unweave.list_dictionaries` gives.
        format: which format it is, where its content does not tell.
        options: what its files do not say, such as ``k``; each format has its own.

    Returns:
        Dictionary: in eval mode; it computes what the library computes, in float32.

    Raises:
        UnweaveError: when nothing is recognised, files are broken, or unweave lacks the architecture.
    """
    thing, options = resolve(thing, options)
    with opened(thing) as checkpoint:
        kind = get(format) if format else recognise(checkpoint)
        facts = kind.inspect(checkpoint, **_known(kind, options))
        if facts.missing:
            raise UnweaveError(f"{checkpoint.called}: {facts.missing}")
        dictionary = kind.read(checkpoint, **options)
    dictionary.trained_on = facts.origin
    return dictionary


def inspect(thing: str | Path, *, format: str | None = None, **options: Any) -> Facts:
    """What is known of a checkpoint, from headers and settings; no weights are read, nor fetched from a hub.

    Raises:
        UnweaveError: when nothing is recognised or files are broken.
    """
    thing, options = resolve(thing, options)
    with opened(thing) as checkpoint:
        kind = get(format) if format else recognise(checkpoint)
        facts = kind.inspect(checkpoint, **_known(kind, options))
        return replace(facts, context={**facts.context, **checkpoint.known})


@torch.no_grad()
def write(dictionary: Dictionary, format: str, folder: str | Path, facts: Facts | None = None) -> Path:
    """Write a dictionary as another library's checkpoint, and read it back to see that it computes the same.

    Args:
        dictionary: any. format: see :func:`writable`. folder: new or empty. facts: model, site and so on, to be kept.

    Returns:
        Path: the folder.

    Raises:
        UnweaveError: when the format cannot express the dictionary, or the folder is not empty.
    """
    kind, folder = get(format), Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UnweaveError(f"{folder} is not empty: choose a new folder")
    dictionary = dictionary.eval()
    known = facts or Facts("unweave", dictionary.name)
    kind.write(dictionary, folder, known)
    again = kind.read(Checkpoint(folder))
    x = torch.randn(64, dictionary.d_in, generator=torch.Generator().manual_seed(0)).to(dictionary.device)
    expected, found = dictionary(x), again(x.cpu()).to(x.device)
    error = float((expected - found).norm() / expected.norm().clamp_min(1e-30))
    if not error < 1e-4:
        shutil.rmtree(folder)
        raise UnweaveError(
            f"{kind.title} cannot express this {dictionary.name!r} dictionary: what was written computes something "
            f"else (relative difference {error:.2g}) and was deleted again"
        )
    return folder


def _known(kind: Format, options: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(options.keys() - kind.options.keys())
    if unknown:
        takes = "; ".join(f"{name}: {text}" for name, text in kind.options.items()) or "none"
        raise UnweaveError(f"{kind.title} takes no option {unknown[0]!r}. Its options: {takes}")
    return options


def _nearby(checkpoint: Checkpoint) -> str:
    """Where the dictionaries are, if the user named a folder above them."""
    if checkpoint.file is not None:
        return ""
    found = []
    for n, folder in enumerate(sorted(p for p in checkpoint.folder.rglob("*") if p.is_dir())):
        if n >= (24 if checkpoint.files.remote else 200) or len(found) == 8:
            break
        below = checkpoint.at(folder)
        if any(_FORMATS[name].recognise(below) for name in names()):
            found.append(folder.relative_to(checkpoint.folder).as_posix())
    return f". Dictionaries lie below it: name one of {', '.join(found)}" if found else ""
