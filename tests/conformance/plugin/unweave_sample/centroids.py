"""A method that learns without gradients, and whose codes have no units."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unweave import SparseCode, UnweaveError
from unweave.dictionaries import Dictionary, DictionaryConfig, Loss, TrainingBatch


class Centroids(Dictionary):
    """``z = one-hot(argmin_i ||x - c_i||)``; each centroid is the mean of the rows it won (MacQueen 1967)."""

    Config = DictionaryConfig
    citation = "MacQueen 1967, Some methods for classification and analysis of multivariate observations"
    learns_by_gradient = False
    scaled_codes = False
    counts: Tensor

    def __init__(self, config: DictionaryConfig) -> None:
        super().__init__(config)
        if config.d_in != config.d_out:
            raise UnweaveError("centroids need d_in == d_out")
        self.C = nn.Parameter(torch.zeros(config.n_features, config.d_in), requires_grad=False)
        self.register_buffer("counts", torch.zeros(config.n_features))

    def initialise(self, sample: Tensor, target: Tensor) -> None:
        self.C.copy_(sample[torch.randint(len(sample), (self.n_features,))])

    def encode(self, x: Tensor) -> SparseCode:
        x = self.check_input(x)
        nearest = (self.C.square().sum(1) - 2 * x @ self.C.T).argmin(1)
        return SparseCode.from_fixed_k(nearest[:, None], torch.ones_like(x[:, :1]), self.n_features)

    def decode(self, code: SparseCode) -> Tensor:
        if code.n_features != self.n_features:
            raise UnweaveError(f"expected a code of {self.n_features} features, found {code.n_features}")
        return code.dense() @ self.C

    def absorb(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        error = (batch.input - self.decode(code)).square().sum(1).mean()
        z = code.dense()
        self.counts += z.sum(0)
        self.C += (z.T @ batch.input - z.sum(0)[:, None] * self.C) / self.counts.clamp_min(1)[:, None]
        return Loss(error, {"inertia": error}, code)

    def decoder_directions(self) -> Tensor:
        return self.C.detach()

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        self.C.div_(scale)
