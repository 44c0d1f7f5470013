"""TopK: exactly k features a row."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Step, auxk_backward
from unweave.dictionaries._linear import LinearConfig, LinearDictionary, scale_to_unit_gain
from unweave.dictionaries.registry import register
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Rule, TopKRule


class TopKConfig(LinearConfig):
    """
    Attributes:
        k: features per row.
        auxk_coefficient: weight of the AuxK loss; inputs are scaled to E||x||^2 = 1, so it needs no other unit.
        k_aux: dead features per row in that loss; half of d_in when None.
    """

    k: PositiveInt = 32
    auxk_coefficient: float = Field(1 / 32, ge=0)
    k_aux: PositiveInt | None = None

    @model_validator(mode="after")
    def _k_fits(self) -> TopKConfig:
        if self.k > self.n_features:
            raise ValueError(f"k must be at most n_features = {self.n_features}")
        return self


@register("topk")
class TopK(LinearDictionary):
    """``z = ReLU(TopK_k(u))``, unit-norm atoms, loss ``||x - x_hat||^2 + AuxK / 32``."""

    Config = TopKConfig
    citation = "Gao et al. 2024, Scaling and evaluating sparse autoencoders, arXiv:2406.04093"
    good_for = "a fixed budget a row, the simplest strong baseline; the fastest to train"
    signed: ClassVar[bool] = False  # whether features are ranked by magnitude and may be negative

    def rule(self) -> Rule:
        return TopKRule(self.config.k, signed=self.signed)

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        return values if self.signed else F.relu(values)

    def loss(self, batch: TrainingBatch) -> Loss:
        return self.loss_of(batch, self.encode(batch.input))

    def loss_of(self, batch: TrainingBatch, code: SparseCode) -> Loss:
        """The loss of a batch whose code is worked out already."""
        trained, mse, reconstruction = self.errors(code, batch.target)
        residual = batch.target - reconstruction
        auxk = auxk_loss(self, batch.input, residual, batch.dead, self._k_aux, signed=self.signed)
        total = trained + self.config.auxk_coefficient * auxk
        return Loss(total, {"mse": mse.detach(), "auxk": auxk.detach()}, code.detach(), reconstruction.detach())

    def backward(self, step: Step) -> Backward:
        return auxk_backward(self, step, self._k_aux, self.config.auxk_coefficient, signed=self.signed)

    @property
    def _k_aux(self) -> int:
        return self.config.k_aux or max(1, self.d_in // 2)

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, target)
        scale_to_unit_gain(self, sample)
