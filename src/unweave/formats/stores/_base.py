"""What every foreign store has: a folder, facts, options; and what those of activations give as a source."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unweave.batch import ActivationBatch, Items
from unweave.errors import UnweaveError
from unweave.formats._facts import UNKNOWN
from unweave.formats.containers import Settings
from unweave.sources import Source

BATCH_ROWS = 4096  # about as many rows are read at once, whole contexts and at least one
_MAX_CELLS = 1 << 40


class ForeignStore:
    """One folder of another library. A new format is one file: a subclass that knows its files by their content.

    Attributes:
        title: whose it is. holds: activation rows or codes.
        options: what a user may say where the files do not, with a line of help each; ``model`` and ``site`` always.
        model, site: as far as known, the site in unweave's words. context_size: tokens of a context. tokens: whether
            their ids are there; "none" for what is no text.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    holds: ClassVar[Literal["activations", "codes"]] = "activations"
    options: ClassVar[dict[str, str]] = {}

    model: str | None = None
    site: str | None = None
    context_size: int
    tokens: Literal["kept", "unknown", "none"] = "unknown"

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder = folder
        takes = {**self.options, "model": "the model's name", "site": "its site, such as layers.12"}
        for name in options.keys() - takes.keys():
            raise UnweaveError(
                f"a store of {self.title} takes no option {name!r}. Its options: "
                + "; ".join(f"{known}: {help}" for known, help in takes.items())
            )
        self.given = Settings(options, "the options")
        self._open()
        self.model = self.given.get("model", str, self.model or "") or None
        self.site = self.given.get("site", str, self.site or "") or None

    def __repr__(self) -> str:
        return f"{self.title}'s {self.holds} in {self.folder}"

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        """Whether a folder holds such a store, from its names and headers. Never raises."""
        raise NotImplementedError

    def _open(self) -> None:
        """Read settings and headers, and set ``model``, ``site`` and ``context_size``.

        Raises:
            UnweaveError: for a file that is missing, cut short or does not fit the others.
        """
        raise NotImplementedError

    def _origin(self, **more: Any) -> dict[str, Any]:
        """Provenance: what is known of the place, ``more``, and what is unknown."""
        known = {"model": {"name": self.model} if self.model else None, "site": self.site}
        unknown = [name for name, value in known.items() if value is None]
        unknown += ["tokens"] if self.tokens == "unknown" else []
        return {
            "kind": "imported",
            "library": self.name,
            **{name: value for name, value in known.items() if value is not None},
            **({"target_site": self.site} if self.site else {}),
            "context_size": self.context_size,
            **more,
            **({"unknown": unknown} if unknown else {}),
        }

    def facts(self) -> list[tuple[str, str]]:
        """Names and values for a card."""
        shown = [("library", self.title), ("holds", self.holds), ("model", self.model or UNKNOWN)]
        shown += [("site", self.site or UNKNOWN), ("context size", f"{self.context_size:,}")]
        return [*shown, ("tokens", self.tokens)]


class ForeignRows(ForeignStore, Source):
    """Activations that another library stored, as a source: what can be harvested, trained on and measured.

    Attributes:
        width, dtype: of the rows. n_rows: how many there are, or at most are. data: what the files say of where they
            came from, JSON-able.
    """

    width: int
    n_rows: int
    dtype: str
    data: dict[str, Any]

    @property
    def d_in(self) -> int:
        return self.width

    @property
    def d_out(self) -> int:
        return self.width

    @abstractmethod
    def _files(self) -> list[Path]:
        """The files that hold rows, in order."""

    @property
    def provenance(self) -> dict[str, Any]:
        options = {name: value for name, value in self.given.items() if name not in ("model", "site")}
        data = {**self.data, "files": self._digest}
        return self._origin(dtype=self.dtype, data=data, **({"options": options} if options else {}))

    @cached_property
    def _digest(self) -> dict[str, Any]:
        """What tells these files from others without reading gigabytes: their names, lengths and first bytes."""
        digest, total = hashlib.sha256(), 0
        for path in self._files():
            size = path.stat().st_size
            with open(path, "rb") as file:
                digest.update(f"{path.name} {size}\n".encode() + file.read(1 << 16))
            total += size
        return {"count": len(self._files()), "bytes": total, "sha256_of_names_and_starts": digest.hexdigest()}

    def facts(self) -> list[tuple[str, str]]:
        return [
            *super().facts(),
            ("rows", f"{self.n_rows:,} of width {self.d_in:,}, {self.dtype}"),
            *((name, str(value)[:200]) for name, value in self.data.items() if value is not None),
            ("files", f"{len(self._files())}"),
        ]

    @property
    def per_batch(self) -> int:
        """Contexts read at once."""
        return max(1, BATCH_ROWS // self.context_size)

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        for path, n, first in self._stretches():
            pieces = range(0, n, self.per_batch)
            if skip >= len(pieces):
                skip -= len(pieces)
                continue
            yield from self._read(path, n, first, skip)
            skip = 0

    @abstractmethod
    def _stretches(self) -> Iterator[tuple[Path, int, int]]:
        """The files with their numbers of contexts, and the number of each one's first context."""

    @abstractmethod
    def _read(self, path: Path, n: int, first: int, skip: int) -> Iterator[ActivationBatch]:
        """The contexts of one file, ``per_batch`` at a time, from piece ``skip`` on."""


def contexts(
    rows: Tensor, tokens: Tensor | None, first: int, keep: Tensor | None = None, lengths: Tensor | None = None
) -> ActivationBatch:
    """A batch of contexts of equal length.

    Args:
        rows: ``(n, t, d)``. tokens: ``(n, t)``, or None where they are unknown. first: number of the first context;
            what document it was cut from no foreign store says, so every context counts as one.
        keep: ``(n, t)``, the tokens that give a row; None for all.
        lengths: ``(n,)``, how many tokens of each context are real and not padding; None for all.
    """
    n, t, d = rows.shape
    real = torch.ones(n, t, dtype=torch.bool) if lengths is None else torch.arange(t) < lengths[:, None]
    keep = real if keep is None else keep & real
    offsets = torch.zeros(n + 1, dtype=torch.int64)
    offsets[1:] = real.sum(1).cumsum(0)
    ids = torch.full((n, t), -1, dtype=torch.int32) if tokens is None else tokens.to(torch.int32)
    items = Items(ids[real], offsets, torch.arange(first, first + n), torch.zeros(n, dtype=torch.int32))
    chosen = rows.reshape(n * t, d) if bool(keep.all()) else rows[keep]
    return ActivationBatch(chosen, chosen, items, keep[real].nonzero().flatten())


def check_tokens(path: Path, tokens: Tensor) -> Tensor:
    """Token ids as int64, refused where they are none."""
    tokens = tokens.long()
    if bool((tokens < 0).any()) or bool((tokens >= 1 << 31).any()):
        raise UnweaveError(
            f"{path}: expected token ids from 0 to 2^31 - 1, found {int(tokens.min())}..{int(tokens.max())}"
        )
    return tokens


def check_size(path: Path, what: str, *sizes: int) -> int:
    """The number of cells of such a shape, refused when no such array can be."""
    cells = 1
    for size in sizes:
        cells *= size
    if min(sizes) < 1 or cells > _MAX_CELLS:
        raise UnweaveError(f"{path}: expected {what} of a sensible shape, found {sizes}")
    return cells


def numbered(names: Iterable[str], pattern: str) -> dict[tuple[int, int], str]:
    """Names that fit a pattern of two numbers (one that is left out is 0), by those numbers and in their order."""
    fits = {name: match for name in names if (match := re.fullmatch(pattern, name))}
    return dict(sorted(((int(match[1] or 0), int(match[2])), name) for name, match in fits.items()))


def names_in(folder: Path) -> list[str]:
    """The files in a folder; none if it cannot be read."""
    try:
        return sorted(p.name for p in folder.iterdir() if p.is_file())
    except OSError:
        return []
