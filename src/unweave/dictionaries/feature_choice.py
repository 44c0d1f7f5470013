"""Feature Choice: each feature takes its own number of rows, so that none can die."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._zipf import allot, fit_zipf, ranks_of
from unweave.dictionaries.mutual_choice import MutualChoice, MutualChoiceConfig
from unweave.dictionaries.registry import register
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, Rule, TopKRule
from unweave.kernels.select.reference import select_columns


class FeatureChoiceConfig(MutualChoiceConfig):
    """
    Attributes:
        budgets: how the ``k n`` entries of a batch are shared out: "zipf" in proportion to ``(rank + q)^-a``, by the
            rank of a feature's density at the end of the first phase, with a and q fitted there; or "uniform".
        mutual_share: the first share of training, which runs as Mutual Choice to learn the densities (the paper names
            none; ours is a tenth). 0 starts with Feature Choice and needs "uniform".
    """

    budgets: Literal["zipf", "uniform"] = "zipf"
    mutual_share: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _densities_are_known(self) -> FeatureChoiceConfig:
        if self.budgets == "zipf" and self.mutual_share == 0:
            raise ValueError('budgets="zipf" needs a first phase that learns the densities: mutual_share above 0')
        return self


@register("feature_choice")
class FeatureChoice(MutualChoice):
    """Training keeps, for feature i, the ``m_i`` rows of the batch with the largest ``ReLU(u_i)``, ``sum m_i = k n``.

    The Zipf form of the budgets m_i is the paper's idea, its constants are ours. A batch needs ``n_features / k`` rows
    to give every feature one; a smaller one leaves out those of the smallest share. Inference keeps ``u_i >
    threshold_i``, a moving average of the middle between the smallest value kept and the largest one left out (the
    smallest kept alone would let too few through, as it lies above the quantile meant). A feature that no batch has had
    a row for stays silent then too.
    """

    Config = FeatureChoiceConfig
    good_for = "no dead features: every feature gets a number of rows to fire in"

    shares: Tensor
    thresholds: Tensor
    settled: Tensor
    n_choices: Tensor

    def __init__(self, config: FeatureChoiceConfig) -> None:
        super().__init__(config)
        self.register_buffer("shares", torch.full((config.n_features,), 1 / config.n_features, dtype=torch.float64))
        self.register_buffer("thresholds", torch.full((config.n_features,), -1.0))  # below 0: none yet
        self.register_buffer("settled", torch.tensor(config.mutual_share == 0))
        self.register_buffer("n_choices", torch.tensor(0))
        self._edges: Tensor | None = None  # of the present step, from its selection to its end

    def budgets(self, n: int) -> Tensor:
        """``(n_features,)`` int64, how many of ``n`` rows each feature may take."""
        return allot(self.shares, self.config.k * n, n)

    def rule(self) -> Rule:
        if self.training or not bool(self.settled):
            return super().rule()
        if self.n_choices == 0:
            return TopKRule(self.config.k)
        return AboveRule(self.thresholds.masked_fill(self.thresholds < 0, torch.inf), 2 * self.config.k)

    def select(self, scores: Tensor) -> Pattern:
        if not (self.training and bool(self.settled)):
            return super().select(scores)
        pattern, self._edges = select_columns(scores, self.budgets(len(scores)))
        return pattern

    def loss(self, batch: TrainingBatch) -> Loss:
        loss = super().loss(batch)
        assert loss.code is not None
        filled = torch.tensor(loss.code.nnz / max(1, self.config.k * len(loss.code)))
        return replace(loss, terms={**loss.terms, "filled": filled})

    @torch.no_grad()
    def observe(self, loss: Loss, progress: float) -> None:
        if not bool(self.settled):
            super().observe(loss, progress)
            if progress >= self.config.mutual_share:
                self._settle()
            return
        edges, self._edges = self._edges, None
        if edges is not None:
            rate = max(self.config.threshold_rate, 5 / (5 + int(self.n_choices)))
            moved = torch.where(self.thresholds < 0, edges, self.thresholds.lerp(edges, rate))
            self.thresholds.copy_(torch.where(edges < 0, self.thresholds, moved))
        self.n_choices.add_(1)
        self.n_updates.add_(1)
        self.measure(loss)

    def _settle(self) -> None:
        """Fix the budgets."""
        line = fit_zipf(self.density) if self.config.budgets == "zipf" else None
        if line is not None:
            self.shares.copy_(line.at(ranks_of(self.density)))
            self.shares.div_(self.shares.sum())
        self.settled.fill_(True)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.thresholds.copy_(torch.where(self.thresholds < 0, self.thresholds, self.thresholds / (out_scale or scale)))
