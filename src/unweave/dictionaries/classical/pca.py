"""PCA: the directions of largest variance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unweave.dictionaries.classical._base import ClassicalConfig, LinearClassical
from unweave.dictionaries.registry import register


@register("pca")
class PCA(LinearClassical):
    """``z = C (x - mean)`` with C the principal components, of either sign, the k largest by magnitude if k is given.

    Worked out from the mean and the covariance of all rows (not of a sample), in float64. Feature i is the component
    of the i-th largest variance, signed so that its largest entry is positive; there are at most d of them.
    """

    Config = ClassicalConfig
    citation = "Pearson 1901; Hotelling 1933, Analysis of a complex of statistical variables into principal components"
    good_for = "the best linear subspace: what a dictionary has to beat"

    def sample(self) -> nn.Module:
        return _Moments(self.d_in).to(self.device)

    def learn(self, rows: Tensor) -> None:
        moments: _Moments = self.learning
        mean, covariance = moments.mean_and_covariance()
        vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1).T[: self.n_features]  # eigenvalues rise
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        components = (vectors * largest.sign()).to(self.W_dec)
        self.set_atoms(components, components, mean)


class _Moments(nn.Module):
    """Streaming mean and covariance. Sums are taken of ``x - shift``: a large mean would cost them their digits."""

    shift: Tensor
    total: Tensor
    product: Tensor
    n_kept: Tensor
    n_learnt: Tensor

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("product", torch.zeros(d, d, dtype=torch.float64))
        self.register_buffer("n_kept", torch.tensor(0))
        self.register_buffer("n_learnt", torch.tensor(0))

    def add(self, x: Tensor) -> None:
        if self.n_kept == 0:
            self.shift.copy_(x.double().mean(0))
        for block in x.split(8192):
            moved = block.double() - self.shift
            self.total += moved.sum(0)
            self.product += moved.T @ moved
        self.n_kept += len(x)

    def rows(self) -> Tensor:
        return self.shift[None, :0]  # none are kept

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        n, mean = int(self.n_kept), self.total / self.n_kept
        return self.shift + mean, self.product / n - torch.outer(mean, mean)
