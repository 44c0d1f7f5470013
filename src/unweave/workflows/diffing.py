"""What a crosscoder of two models, or of two sites, says that each has to itself and what both share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.dictionaries.crosscoder import ModelDiff, model_diff
from unweave.errors import UnweaveError
from unweave.features import FeatureStore
from unweave.runs import Run
from unweave.sources import part_labels, part_names


@dataclass(frozen=True)
class Difference:
    """The features of a run by the part they belong to.

    Attributes:
        parts: what the two are called. features: the run's. sorted: see :class:`~unweave.dictionaries.ModelDiff`.
        density: ``(n_features,)``, share of the indexed rows on which each fires.
    """

    parts: tuple[str, str]
    features: FeatureStore
    sorted: ModelDiff
    density: Tensor

    @property
    def groups(self) -> dict[str, Tensor]:
        """The numbers of the features of each group, those that fire most often first."""
        found = self.sorted
        masks = {"only a": found.only_a, "only b": found.only_b, "shared": found.shared}
        masks["in between"] = (self.density > 0) & ~(found.only_a | found.only_b | found.shared)
        numbers = {name: mask.nonzero().squeeze(1) for name, mask in masks.items()}
        return {name: at[self.density[at].argsort(descending=True, stable=True)] for name, at in numbers.items()}

    @property
    def n_dead(self) -> int:
        """Features that never fired in the indexed rows: they are in no group."""
        return int((self.density == 0).sum())


def diff(run: Run, *, exclusive: float = 0.1, even: float = 0.1) -> Difference:
    """Sort the features of a run by the model (or site) they belong to.

    Args:
        run: of a crosscoder of two parts, indexed. exclusive, even: see :func:`~unweave.dictionaries.model_diff`.

    Raises:
        UnweaveError: when it is of another architecture or number of parts, or not indexed.
    """
    if run.features is None:
        model_diff(run.dictionary, exclusive=exclusive, even=even)  # what cannot be compared is told first
        raise UnweaveError(f"{run.folder} has no feature store yet: run `unweave index {run.folder}` first")
    density = torch.from_numpy(run.features.table["density"].copy())
    found = model_diff(run.dictionary, exclusive=exclusive, even=even, alive=density > 0)
    source = run.provenance.get("source", {})
    labels, names = part_labels(source) or ["0", "1"], part_names(source)
    first, second = (names.get(label, label) for label in labels)
    return Difference((first, second), run.features, found, density)
