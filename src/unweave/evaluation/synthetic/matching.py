"""Which dictionary feature is which planted one: matching by the cosine of directions, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.errors import UnweaveError


@dataclass(frozen=True)
class Match:
    """The pairing of true and found directions with the largest sum of cosines (or of their absolute values).

    Attributes:
        true, found: ``(p,)`` int64, pair by pair, ``p = min(n_true, n_found)``; ``true`` rises.
        cosine: ``(p,)`` float64, of each pair, with its sign.
        best: ``(n_true,)`` float64, of each true direction with the found one nearest to it (absolute where signs
            do not count). nearest: ``(n_true,)``, which one that is.
        nearest_true: ``(n_found,)``, the true direction nearest to each found one; -1 for a found direction of zeros.
    """

    true: Tensor
    found: Tensor
    cosine: Tensor
    best: Tensor
    nearest: Tensor
    nearest_true: Tensor

    @property
    def mmcs(self) -> float:
        """Mean over the true directions of the largest cosine with a found one (Sharkey et al. 2022)."""
        return float(self.best.mean())

    @property
    def mcc(self) -> float:
        """Mean over the pairs of the absolute cosine."""
        return float(self.cosine.abs().mean())

    def recall(self, threshold: float = 0.9) -> float:
        """Share of the true directions that some found one has at least this cosine with."""
        return float((self.best >= threshold).double().mean())

    @property
    def uniqueness(self) -> float:
        """Share of the true directions whose nearest found one is not nearest to another true direction too."""
        return float((torch.bincount(self.nearest)[self.nearest] == 1).double().mean())

    @property
    def distinct_share(self) -> float:
        """Different true directions that are nearest to some found one, over the number found: two found for one
        thing bring it down to a half (SynthSAEBench's uniqueness)."""
        return len(self.nearest_true[self.nearest_true >= 0].unique()) / len(self.nearest_true)


def match(true: Tensor, found: Tensor, *, absolute: bool = True) -> Match:
    """Pair true and found directions one to one, by the Hungarian method.

    Args:
        true: ``(n_true, d)``. found: ``(n_found, d)``; lengths do not matter, a row of zeros has cosine 0 with all.
        absolute: whether a direction and its opposite are the same.

    Raises:
        UnweaveError: when widths differ, a side is empty, or a number is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if true.ndim != 2 or found.ndim != 2 or true.shape[1] != found.shape[1] or not len(true) or not len(found):
        raise UnweaveError(f"match: expected (n, d) and (m, d), found {tuple(true.shape)} and {tuple(found.shape)}")
    if not (bool(torch.isfinite(true).all()) and bool(torch.isfinite(found).all())):
        raise UnweaveError("match: the directions hold NaN or infinity")
    true, found = true.detach().cpu().double(), found.detach().cpu().double()
    cosines = F.normalize(true, dim=1) @ F.normalize(found, dim=1).T
    closeness = cosines.abs() if absolute else cosines
    rows, columns = linear_sum_assignment(closeness.numpy(), maximize=True)
    at, to = torch.from_numpy(rows).long(), torch.from_numpy(columns).long()
    best, nearest = closeness.max(1)
    nearest_true = closeness.argmax(0).masked_fill((found == 0).all(1), -1)
    return Match(at, to, cosines[at, to], best, nearest, nearest_true)
