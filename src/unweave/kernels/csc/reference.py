"""Sort the entries of a CSR pattern by feature, keeping row order within a feature (so it is deterministic)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unweave.kernels.pattern import Pattern


class Columns(NamedTuple):
    """The entries by feature: feature ``f`` owns ``order[starts[f]:starts[f + 1]]``."""

    starts: Tensor  # (n_features + 1,) int64
    rows: Tensor  # (nnz,) int64, the row of each entry in column order
    order: Tensor  # (nnz,) int64, entry numbers in column order


def counts(indices: Tensor, values: Tensor, n_features: int) -> Tensor:
    """``(n_features,)`` int64, how many entries of each feature have a value other than 0."""
    return torch.bincount(indices[values != 0].long(), minlength=n_features)


def csc(pattern: Pattern) -> Columns:
    order = torch.argsort(pattern.indices, stable=True)
    starts = torch.zeros(pattern.n_features + 1, dtype=torch.long, device=order.device)
    starts[1:] = torch.bincount(pattern.indices, minlength=pattern.n_features).cumsum(0)
    return Columns(starts, pattern.rows[order], order)
