"""The smallest method worth having: one matrix that reads and writes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from unweave import SparseCode, UnweaveError
from unweave.dictionaries import Dictionary, DictionaryConfig, Loss, TrainingBatch


class TiedConfig(DictionaryConfig):
    """
    Attributes:
        k: features per row.
    """

    k: PositiveInt = 8

    @model_validator(mode="after")
    def _fits(self) -> TiedConfig:
        if self.k > self.n_features:
            raise ValueError(f"k must be at most n_features = {self.n_features}")
        if self.d_in != self.d_out:
            raise ValueError("tied atoms need d_in == d_out")
        return self


class Tied(Dictionary):
    """``z = u`` where ``|u|`` is among the k largest, ``u = D (x - b)``; ``x_hat = z D + b``; unit atoms."""

    Config = TiedConfig
    homogeneous = True

    def __init__(self, config: TiedConfig) -> None:
        super().__init__(config)
        self.D = nn.Parameter(F.normalize(torch.randn(config.n_features, config.d_in), dim=1))
        self.b = nn.Parameter(torch.zeros(config.d_in))

    def encode(self, x: Tensor) -> SparseCode:
        u = (self.check_input(x) - self.b) @ self.D.T
        at = u.detach().abs().topk(self.config.k, dim=1).indices
        return SparseCode.from_fixed_k(at, u.gather(1, at), self.n_features)

    def decode(self, code: SparseCode) -> Tensor:
        if code.n_features != self.n_features:
            raise UnweaveError(f"expected a code of {self.n_features} features, found {code.n_features}")
        return code.dense() @ self.D + self.b

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        reconstruction = self.decode(code)
        mse = (batch.target - reconstruction).square().sum(1).mean()
        return Loss(mse, {"mse": mse.detach()}, code.detach(), reconstruction.detach())

    def decoder_directions(self) -> Tensor:
        return self.D.detach()

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        self.b.copy_(target.mean(0))

    @torch.no_grad()
    def after_step(self, loss: Loss, progress: float) -> None:
        self.D.copy_(F.normalize(self.D, dim=1))

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        self.b.div_(scale)


class Curved(Tied):
    """Tied atoms with a decoder that is not linear: ``x_hat = z D + z^2 Q + b``."""

    linear_decoder = False

    def __init__(self, config: TiedConfig) -> None:
        super().__init__(config)
        self.Q = nn.Parameter(torch.zeros(config.n_features, config.d_in))

    def decode(self, code: SparseCode) -> Tensor:
        return super().decode(code) + code.dense().square() @ self.Q

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.Q.mul_(scale)
