"""Where reconstructions of rows of several parts are put back: sites of one model, or one site of each of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from unweave.interventions import RowEdit
from unweave.metrics import Groups, ReconstructionSums
from unweave.sources import part_labels, target_parts
from unweave.sources.composite import AnySite


@dataclass(frozen=True)
class Splice:
    """The site (or sites) of one model that target rows, or some of their columns, were read from.

    Attributes:
        model: a LanguageModel. site: where. columns: of the target rows, which are this model's.
        label: what its numbers are told apart by; "" for the only one.
    """

    model: Any
    site: AnySite
    columns: slice
    label: str = ""

    def own(self, fn: RowEdit) -> RowEdit:
        """What ``fn`` makes of whole rows, cut down to this model's columns."""
        return lambda rows: fn(rows)[:, self.columns]


def part_columns(provenance: Mapping[str, Any]) -> dict[str, slice]:
    """The columns of each part of the target rows, by label; empty for rows of one part."""
    found, end = {}, 0
    for label, part in zip(part_labels(provenance), target_parts(provenance)):
        start, end = end, end + int(part["width"])
        found[label] = slice(start, end)
    return found


class PartFit(ReconstructionSums):
    """The fvu of some columns of the rows."""

    def __init__(self, label: str, columns: slice, groups: Groups) -> None:
        super().__init__(columns.stop - columns.start, groups)
        self.label, self.columns = label, columns

    def add(self, x: Tensor, x_hat: Tensor, document: Tensor | None = None) -> None:
        super().add(x[:, self.columns], x_hat[:, self.columns], document)

    def statistics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        return {f"fvu:{self.label}": super().statistics(weights)["fvu"]}


def find_splices(model: Any, source: Any, provenance: Mapping[str, Any]) -> list[Splice]:
    """How to put back what is made of rows of several parts; nothing where their models are not known.

    Rows of several models (or of one site twice) are put back into each model by itself, rows of several sites of one
    model at all of them at once.
    """
    columns = part_columns(provenance)
    if columns and list(columns) != [part["site"] for part in target_parts(provenance)]:
        joined = getattr(source, "joined", [])
        if not joined or not all(hasattr(getattr(one, "model", None), "composite") for one in joined):
            return []
        return [Splice(s.model, s.target_site, at, label) for s, (label, at) in zip(joined, columns.items())]
    if not hasattr(model, "composite"):
        return []
    return [Splice(model, model.composite(str(provenance.get("target_site") or provenance["site"])), slice(None))]
