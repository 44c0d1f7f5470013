"""Activations of any ``nn.Module`` over any inputs: vision models, encoders, one's own networks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unweave.batch import ActivationBatch, Items
from unweave.errors import UnweaveError
from unweave.sources._base import Source
from unweave.sources.composite import CompositeSite, find_sites, join_parts, parts_facts
from unweave.sources.sites import capture


class ModuleSource(Source):
    """The activations at a site of a module.

    Every example (first dimension of an input) is an item: its row positions are what lies between the first
    dimension and the channels, say the patches of an image. Items have no tokens (-1), and their ``document``
    counts the examples.

    Args:
        module: put in eval mode. inputs: batches, each a tensor, a tuple of arguments or a dict of keyword arguments; a
            list or DataLoader that gives the same batches at each pass, or a function that returns an iterator.
        site: a module path (or ``layers.N...``, see :mod:`unweave.sources.sites`), or several joined by a plus (see
            :mod:`unweave.sources.composite`). target_site: likewise, for targets.
        channel_dim: the dimension of a row's coordinates in the site's tensor: -1, or 1 for feature maps (b, c, h, w).
        name: what the model and its inputs are, for provenance.

    Raises:
        UnweaveError: for an unknown site, inputs that can be read only once, or a site without rows.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Iterable[Any] | Callable[[], Iterator[Any]],
        site: str,
        *,
        target_site: str | None = None,
        channel_dim: int = -1,
        name: str = "module",
    ) -> None:
        if isinstance(inputs, Iterator):
            raise UnweaveError(
                "inputs: an iterator can be read only once. Give a list, a DataLoader, or a function that returns a "
                "new iterator"
            )
        self.module, self.name, self.channel_dim = module.eval(), name, channel_dim
        self._open: Callable[[], Iterable[Any]] = inputs if callable(inputs) else lambda: inputs
        self.site = find_sites(module, site)
        self.target_site = self.site if target_site is None else find_sites(module, target_site)
        self._widths: dict[str, int] = {}  # of the parts, known once a batch was run
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._facts: dict[str, Any] | None = None

    def _first_batch(self) -> dict[str, Any]:
        """Widths and a hash of the first batch, from running it once."""
        if self._facts is None:
            batch = next(self.batches(), None)
            if batch is None:
                raise UnweaveError("inputs hold no batch to run the module on")
            digest = hashlib.sha256()
            for rows in (batch.input, batch.target):
                digest.update(f"{tuple(rows.shape)}".encode())
                digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
            self._facts = {
                "d_in": batch.input.shape[1],
                "d_out": batch.target.shape[1],
                "dtype": str(batch.input.dtype).removeprefix("torch."),
                "sha256": digest.hexdigest(),
            }
        return self._facts

    @property
    def d_in(self) -> int:
        return self._first_batch()["d_in"]

    @property
    def d_out(self) -> int:
        return self._first_batch()["d_out"]

    @property
    def provenance(self) -> dict[str, Any]:
        facts = self._first_batch()
        parts = {
            key: parts_facts([part.name for part in site.parts], [self._widths[part.name] for part in site.parts])
            for key, site in (("parts", self.site), ("target_parts", self.target_site))
            if isinstance(site, CompositeSite)
        }
        return {
            "kind": "module",
            "model": {"name": self.name, "class": type(self.module).__name__},
            "site": self.site.name,
            "target_site": self.target_site.name,
            **parts,
            "channel_dim": self.channel_dim,
            "dtype": facts["dtype"],
            "data": {"sha256_of_first_batch": facts["sha256"]},
        }

    def __repr__(self) -> str:
        return f"ModuleSource({self.name} at {self.site.name})"

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        same = self.target_site.name == self.site.name
        sites = [*self.site.parts, *(() if same else self.target_site.parts)]
        first = 0
        for number, given in enumerate(self._open()):
            args, kwargs = _arguments(given, self._device)
            n = _n_examples(args, kwargs)
            if number >= skip:
                found = capture(sites, lambda args=args, kwargs=kwargs: self.module(*args, **kwargs))
                read = {name: self._rows(tensor, n, name) for name, tensor in found.items()}
                self._widths = {name: rows.shape[1] for name, rows in read.items()}
                n_rows = len(read[sites[0].name])
                for name, other in read.items():
                    if len(other) != n_rows:
                        raise UnweaveError(
                            f"sites {sites[0].name!r} and {name!r} give {n_rows} and {len(other)} rows: all must have "
                            "one row for each position"
                        )
                rows = join_parts(self.site, read)
                target = rows if same else join_parts(self.target_site, read)
                items = _items(n, len(rows) // n, first)
                yield ActivationBatch(rows, target, items, torch.arange(len(rows)))
            first += n

    def _rows(self, tensor: Tensor, n: int, name: str) -> Tensor:
        """``(n * positions, d)`` rows on the CPU."""
        if tensor.ndim < 2 or tensor.shape[0] != n or not -tensor.ndim <= self.channel_dim < tensor.ndim:
            raise UnweaveError(
                f"site {name!r}: expected a tensor (examples, ..., d) of {n} examples with channel_dim "
                f"{self.channel_dim}, found shape {tuple(tensor.shape)}"
            )
        rows = tensor.movedim(self.channel_dim, -1)
        return rows.reshape(-1, rows.shape[-1]).cpu()


def _arguments(given: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of one call, their tensors where the module is."""

    def moved(part: Any) -> Any:
        return part.to(device) if isinstance(part, Tensor) else part

    if isinstance(given, Mapping):
        return (), {key: moved(part) for key, part in given.items()}
    return tuple(moved(part) for part in (given if isinstance(given, (tuple, list)) else (given,))), {}


def _n_examples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for part in (*args, *kwargs.values()):
        if isinstance(part, Tensor) and part.ndim:
            return part.shape[0]
    raise UnweaveError("inputs: expected batches that hold a tensor (examples, ...), found none in one of them")


def _items(n: int, per_example: int, first: int) -> Items:
    return Items(
        tokens=torch.full((n * per_example,), -1, dtype=torch.int32),
        offsets=torch.arange(n + 1) * per_example,
        document=torch.arange(first, first + n),
        start=torch.zeros(n, dtype=torch.int32),
    )
