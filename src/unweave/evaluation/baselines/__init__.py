"""Rivals every dictionary is shown beside: what as many numbers a row buy without training a dictionary.

A baseline is fitted on rows that are not evaluated and then maps rows to reconstructions. Each gets ``l0`` numbers
a row, the dictionary's own mean L0, rounded. One file each; :func:`register` adds another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from unweave.evaluation.baselines.neurons import Neurons
from unweave.evaluation.baselines.pca import PCA
from unweave.evaluation.baselines.random_dictionary import RandomDictionary

#: Called as ``kind(rows (n, d), l0=..., n_features=..., seed=...)``; the result maps ``(n, d)`` to ``(n, d)``.
Baseline = Callable[..., Callable[[Tensor], Tensor]]

BASELINES: dict[str, Baseline] = {"pca": PCA, "random": RandomDictionary, "neurons": Neurons}


def register(name: str, kind: Any) -> None:
    """Show another baseline in every evaluation."""
    BASELINES[name] = kind


__all__ = ["BASELINES", "PCA", "Baseline", "Neurons", "RandomDictionary", "register"]
