"""What every source is: batches of activation rows, in a fixed order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from unweave.batch import ActivationBatch


class Source(ABC):
    """Where activations come from: something that yields the same batches whoever asks.

    Rows are on the CPU, in the dtype they were computed in. ``d_in`` is the width of ``batch.input``, ``d_out`` of
    ``batch.target``, ``d_side`` of ``batch.side``; ``provenance`` says, in JSON-able values, everything the rows
    depend on, so two sources with equal provenance yield equal rows.
    """

    @property
    @abstractmethod
    def d_in(self) -> int:
        """Width of the input rows."""

    @property
    @abstractmethod
    def d_out(self) -> int:
        """Width of the target rows."""

    @property
    def d_side(self) -> int | None:
        """Width of the side inputs; None for a source without any."""
        return None

    @property
    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """What the rows depend on (model, site, data, ...), JSON-able."""

    @abstractmethod
    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        """The batches from number ``skip`` on. The model is not run for the ones skipped."""

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self.batches()


class SourceGroup(ABC):
    """Several sources that one pass over the data feeds: batch ``i`` of each comes from the same inputs.

    What the group yields under a name is exactly what ``sources[name]`` yields alone.
    """

    @property
    @abstractmethod
    def sources(self) -> Mapping[str, Source]:
        """The sources by name (the name of a site)."""

    @abstractmethod
    def batches(self, skip: int = 0, names: Collection[str] | None = None) -> Iterator[dict[str, ActivationBatch]]:
        """Batches by name, from number ``skip`` on, of some names (None: all). Only what those need is computed."""
