"""Zipf's line through the densities of features, and what follows from it: who is under-used, and fair budgets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SHIFTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_HEAD = 0.5  # the share of the ranks that the line is fitted to: the far tail, of dying features, falls below it


class Zipf(NamedTuple):
    """``density = scale (rank + shift)^-exponent``, ranks from 1."""

    scale: float
    shift: float
    exponent: float

    def at(self, ranks: Tensor) -> Tensor:
        return self.scale * (ranks + self.shift) ** -self.exponent


def fit_zipf(density: Tensor) -> Zipf | None:
    """The line through the denser half of ``(n_features,)`` densities; None where fewer than three features fire.

    Least squares of log density on log (rank + shift), for the best of a few shifts. A rank counts ``1 / rank``, so
    that each octave of ranks counts the same (our choice: the paper is silent).
    """
    fires = density[density > 0].double().sort(descending=True).values
    if len(fires) < 3:
        return None
    n = max(3, int(_HEAD * len(fires)))
    ranks = torch.arange(1, n + 1, device=fires.device, dtype=torch.float64)
    weights = 1 / ranks
    weights /= weights.sum()
    x = (ranks + torch.tensor(_SHIFTS, device=fires.device, dtype=torch.float64)[:, None]).log()
    y = fires[:n].log()
    x_mean, y_mean = (x @ weights)[:, None], y @ weights
    slopes = ((x - x_mean) * (y - y_mean)) @ weights / ((x - x_mean).square() @ weights)
    errors = (y - y_mean - slopes[:, None] * (x - x_mean)).square() @ weights
    best = int(errors.argmin())
    slope = min(0.0, float(slopes[best]))
    return Zipf(float((y_mean - slope * x_mean[best]).exp()), _SHIFTS[best], -slope)


def ranks_of(density: Tensor) -> Tensor:
    """``(n_features,)`` float64, 1 for the densest; of equals, the first one is the denser."""
    order = density.argsort(descending=True, stable=True)
    ranks = torch.empty(len(density), dtype=torch.float64, device=density.device)
    ranks[order] = torch.arange(1, len(density) + 1, dtype=torch.float64, device=density.device)
    return ranks


def under_used(density: Tensor, share: float) -> Tensor:
    """``(n_features,)`` boolean: whose density is below ``share`` of the line at its rank."""
    line = fit_zipf(density)
    if line is None:
        return torch.zeros_like(density, dtype=torch.bool)
    return density < share * line.at(ranks_of(density))


def allot(shares: Tensor, total: int, most: int) -> Tensor:
    """Whole numbers in proportion to ``(n_features,)`` shares, adding up to ``total``, each from 1 to ``most``.

    Where ``total`` cannot give everybody one, some get none. Rounded by largest remainders.
    """
    total = min(total, most * len(shares))
    least = 1 if total >= len(shares) else 0
    weights = shares.double() / shares.double().sum()
    low, high = 0.0, float(most / weights.clamp_min(1e-300).min())
    for _ in range(100):  # the factor at which the clamped amounts add up
        factor = (low + high) / 2
        over = float((factor * weights).clamp(least, most).sum()) > total
        low, high = (low, factor) if over else (factor, high)
    amounts = (low * weights).clamp(least, most)
    whole = amounts.floor()
    left = total - int(whole.sum())
    remainders = torch.where(whole < most, amounts - whole, -1.0)
    while left > 0:  # more than once only where rounding of the sum itself left something over
        takers = remainders.argsort(descending=True, stable=True)[:left]
        takers = takers[whole[takers] < most]
        whole[takers] += 1
        left -= len(takers)
    return whole.long()
