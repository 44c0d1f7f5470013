"""Adam for a matrix whose rows are features. The update is row by row, so everything else a row needs comes along."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AdamStep(NamedTuple):
    """The numbers of one step: rate, decays, epsilon, and which step it is (from 1)."""

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.betas[0] ** self.step)

    @property
    def correction(self) -> float:
        """What the root of the second moment is multiplied with."""
        return (1 - self.betas[1] ** self.step) ** -0.5


class Rows(NamedTuple):
    """A weight matrix ``(n_features, d)`` with its Adam moments of the same shape, all updated in place.

    ``shadow`` is a bfloat16 copy of the weights to keep up to date, or None. With ``unit_norm`` gradients lose their
    part along the row, and rows are normalised after the step.
    """

    W: Tensor
    first: Tensor
    second: Tensor
    shadow: Tensor | None = None
    unit_norm: bool = False


def project(rows: Rows, G: Tensor) -> Tensor:
    """``G`` without its part along the rows of W, where they have unit norm; in place."""
    if rows.unit_norm:
        along = (G * rows.W).sum(1, keepdim=True) / rows.W.square().sum(1, keepdim=True).clamp_min(1e-24)
        G.sub_(along * rows.W)
    return G


@torch.no_grad()
def adam_rows(rows: Rows, G: Tensor, step: AdamStep, clip: float = 1.0) -> None:
    """One Adam step with the gradient ``clip * G``, as ``torch.optim.Adam`` does it."""
    G = G * clip
    rows.first.lerp_(G, 1 - step.betas[0])
    rows.second.mul_(step.betas[1]).addcmul_(G, G, value=1 - step.betas[1])
    rows.W.addcdiv_(rows.first, rows.second.sqrt() * step.correction + step.eps, value=-step.step_size)
    if rows.unit_norm:
        rows.W.copy_(F.normalize(rows.W, dim=1))
    if rows.shadow is not None:
        rows.shadow.copy_(rows.W)
