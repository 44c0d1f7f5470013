"""Raw neurons: keep the coordinates that stray farthest from their mean, set the others to the mean."""

from __future__ import annotations

import torch
from torch import Tensor


class Neurons:
    """Each row keeps its ``l0`` coordinates with the largest ``|x - mean|``.

    Args:
        rows: ``(n, d)`` to take the mean of. l0: coordinates kept in each row. Other arguments are not used.
    """

    def __init__(self, rows: Tensor, *, l0: int, n_features: int = 0, seed: int = 0) -> None:
        self.mean = rows.mean(0, dtype=torch.float64)
        self.l0 = min(l0, rows.shape[1])

    def __call__(self, rows: Tensor) -> Tensor:
        mean = self.mean.to(rows)
        kept = (rows - mean).abs().topk(self.l0, dim=1, sorted=False).indices
        return mean.expand_as(rows).scatter(1, kept, rows.gather(1, kept))
