"""Matryoshka: nested prefixes of the features each reconstruct the target, so that the first ones learn the general."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._closed_form import Fit, nested_fit
from unweave.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from unweave.dictionaries.registry import register
from unweave.kernels.autograd import sparse_decode
from unweave.kernels.pattern import Pattern
from unweave.kernels.prefixes.reference import group_of
from unweave.kernels.workspace import Workspace


class MatryoshkaConfig(BatchTopKConfig):
    """
    Attributes:
        group_fractions: how the features are divided: shares of n_features, in order, that add up to 1. Prefix i is
            the first i groups.
        group_weights: of each prefix's squared error in the loss, brought to a sum of 1; equal when None.
    """

    group_fractions: tuple[float, ...] = Field((1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32), min_length=1)
    group_weights: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _groups_fit(self) -> MatryoshkaConfig:
        fractions, weights = self.group_fractions, self.group_weights
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"group_fractions must be positive and add up to 1, found a sum of {sum(fractions):g}")
        if len(set(self.prefix_ends())) < len(fractions) or self.prefix_ends()[0] < 1:
            raise ValueError(
                f"group_fractions: {len(fractions)} groups are too many for {self.n_features} features, one is empty"
            )
        if weights is not None and (len(weights) != len(fractions) or min(weights) < 0 or weights[-1] <= 0):
            raise ValueError(f"group_weights must be {len(fractions)} numbers of 0 or more, the last one above 0")
        return self

    def prefix_ends(self) -> list[int]:
        """How many features each prefix has; the last one all of them."""
        ends = torch.tensor(self.group_fractions, dtype=torch.float64).cumsum(0) * self.n_features
        return [*ends.round().long().tolist()[:-1], self.n_features]


@register("matryoshka")
class Matryoshka(BatchTopK):
    """BatchTopK with the loss ``sum_g w_g ||x - (z[:m_g] W_dec[:m_g] + b_dec)||^2 + AuxK / 32``.

    Prefix g holds the first m_g features. A general feature that a prefix needs cannot be split up among the special
    ones behind it.
    """

    Config = MatryoshkaConfig
    citation = (
        "Bussmann et al. 2025, Learning multi-level features with Matryoshka sparse autoencoders, arXiv:2503.17547"
    )

    def __init__(self, config: MatryoshkaConfig) -> None:
        super().__init__(config)
        weights = torch.tensor(config.group_weights or [1.0] * len(config.group_fractions), dtype=torch.float64)
        self._ends, self._weights = torch.tensor(config.prefix_ends()), weights / weights.sum()

    def loss(self, batch: TrainingBatch) -> Loss:
        return self.loss_of(batch, self.encode(batch.input))

    def loss_of(self, batch: TrainingBatch, code: SparseCode) -> Loss:
        pattern, ends, weights = code.pattern, *self._prefixes()
        group, sums, total = group_of(pattern, ends), self.b_dec - batch.target, torch.zeros_like(self.b_dec[0])
        mse = total
        for number, weight in enumerate(weights):
            sums = sums + sparse_decode(code.values * (group == number), self.W_dec, pattern)
            mse = sums.square().sum(1).mean()
            total = total + weight * mse
        auxk = auxk_loss(self, batch.input, -sums, batch.dead, self._k_aux)
        terms = {"mse": mse.detach(), "auxk": auxk.detach()}
        return Loss(total + self.config.auxk_coefficient * auxk, terms, code.detach(), (batch.target + sums).detach())

    def fit(self, pattern: Pattern, values: Tensor, target: Tensor, work: Workspace) -> Fit:
        return nested_fit(pattern, values, self.W_dec.detach(), self.b_dec.detach(), target, work, *self._prefixes())

    def _prefixes(self) -> tuple[Tensor, Tensor]:
        """``(g,)`` ends and weights."""
        return self._ends.to(self.device), self._weights.to(self.b_dec)
