"""Principal components: the best ``l0`` fixed directions in squared error."""

from __future__ import annotations

import torch
from torch import Tensor


class PCA:
    """``mean + sum over the first l0 components of <x - mean, c> c``.

    Args:
        rows: ``(n, d)`` to fit on. l0: number of components, at most d are used. Other arguments are not used.
    """

    def __init__(self, rows: Tensor, *, l0: int, n_features: int = 0, seed: int = 0) -> None:
        rows = rows.cpu()
        self.mean = rows.mean(0, dtype=torch.float64)
        covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for block in rows.split(8192):
            centred = block.double() - self.mean
            covariance += centred.T @ centred
        vectors = torch.linalg.eigh(covariance).eigenvectors  # eigenvalues rise
        self.components = vectors[:, -min(l0, rows.shape[1]) :].T.contiguous()

    def __call__(self, rows: Tensor) -> Tensor:
        mean, components = self.mean.to(rows), self.components.to(rows)
        return mean + ((rows - mean) @ components.T) @ components
