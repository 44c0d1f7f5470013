"""Mutual Choice: rows and features choose each other under one budget; the under-used get a second chance."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Step
from unweave.dictionaries._zipf import under_used
from unweave.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from unweave.dictionaries.registry import register

_LOOK_EVERY = 10  # steps between two looks at who is under-used


class MutualChoiceConfig(BatchTopKConfig):
    """
    Attributes:
        zipf_share: a feature is under-used where its density is below this share of the Zipf line at its rank, and
            then takes part in the auxiliary loss beside the dead ones. 0: only the dead ones do, as in AuxK. The
            paper's value is not known. Ours is small: with many, the under-used ones take all ``k_aux`` places of a
            row, and the dead stay dead.
        density_rate: how fast the running densities follow those of the batch (early on they follow faster).
    """

    zipf_share: float = Field(0.1, ge=0, le=1)
    density_rate: float = Field(0.01, gt=0, le=1)


@register("mutual_choice")
class MutualChoice(BatchTopK):
    """BatchTopK (the ``k n`` largest of ``ReLU(u)`` in a batch) with aux_zipf_loss in place of AuxK.

    AuxK lets the dead features explain what is left over; aux_zipf_loss the under-used ones too: those that fire less
    than ``zipf_share`` of what Zipf's law, fitted to the densities of the denser half, has for their rank.
    """

    Config = MutualChoiceConfig
    citation = "Ayonrinde 2024, Adaptive sparse allocation with mutual choice and feature choice, arXiv:2411.02124"
    good_for = "batch_topk under the name of the paper that compares it with feature_choice"

    density: Tensor
    underused: Tensor

    def __init__(self, config: MutualChoiceConfig) -> None:
        super().__init__(config)
        self.register_buffer("density", torch.zeros(config.n_features))
        self.register_buffer("underused", torch.zeros(config.n_features, dtype=torch.bool))

    def loss(self, batch: TrainingBatch) -> Loss:
        return super().loss(self._with_underused(batch))

    def backward(self, step: Step) -> Backward:
        return super().backward(replace(step, batch=self._with_underused(step.batch)))

    def _with_underused(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with everybody flagged dead who may take part in the auxiliary loss."""
        return replace(batch, dead=self.underused if batch.dead is None else batch.dead | self.underused)

    @torch.no_grad()
    def observe(self, loss: Loss, progress: float) -> None:
        super().observe(loss, progress)
        self.measure(loss)

    def measure(self, loss: Loss) -> None:
        """Follow the densities, and look now and then at who is under-used."""
        assert loss.code is not None
        rate, step = max(self.config.density_rate, 5 / (5 + int(self.n_updates))), int(self.n_updates)
        self.density.lerp_(loss.code.firing_counts().to(self.density) / max(1, len(loss.code)), rate)
        if self.config.zipf_share and step % _LOOK_EVERY == 0:
            self.underused.copy_(under_used(self.density, self.config.zipf_share))
