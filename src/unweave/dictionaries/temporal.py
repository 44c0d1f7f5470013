"""Temporal dictionaries: the features of the first group should change slowly from token to token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch, no_side
from unweave.dictionaries.matryoshka import Matryoshka, MatryoshkaConfig
from unweave.dictionaries.registry import register


class TemporalConfig(MatryoshkaConfig):
    """
    Attributes:
        group_fractions: high-level features first; the paper's 20 to 80.
        contrast_coefficient: weight of the contrastive loss; our choice. On planted slow features 0.5 found them for
            every seed, 0.1 for some (see the tests).
        temperature: what the cosines are divided by; the paper's formula has none, which is 1.
    """

    group_fractions: tuple[float, ...] = Field((0.2, 0.8), min_length=1)
    contrast_coefficient: float = Field(0.5, ge=0)
    temperature: PositiveFloat = 1.0


@register("temporal")
class Temporal(Matryoshka):
    """Matryoshka on ``x_t`` plus ``alpha`` times a contrastive loss between the high-level codes of ``x_t, x_(t-1)``.

    With h the codes of the first group and s the cosine, ``L = -1/(2n) sum_i (log softmax_j s(h_t^i, h_(t-1)^j)[i] +
    log softmax_j s(h_t^j, h_(t-1)^i)[i])``: of all tokens of the batch, a token's predecessor should be the most like
    it. What goes on over many tokens (a topic, a language) then moves into the first group, and what belongs to one
    token into the others.

    The side input of a row is ``x_(t-1)``, the row of the token before it; the code is that of ``x_t`` alone, so a
    trained dictionary takes plain rows. Pairs in place of whole sequences, a batch threshold worked out for each side,
    and both sides learning are our choices.
    """

    Config = TemporalConfig
    citation = "Bhalla, Oesterling et al. 2025, Temporal sparse autoencoders, arXiv:2511.05541"
    good_for = "telling what a text is about (slow features) from what a token is (fast ones)"
    needs_side = "previous"

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__(config)
        self.side_scale: Tensor
        self.register_buffer("side_scale", torch.ones(()))  # side inputs come in their own units

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, target)
        self.side_scale.copy_(sample.square().sum(1).mean().sqrt())

    @torch.no_grad()
    def initialise_side(self, side: Tensor) -> None:
        self.side_scale.div_(side.square().sum(1).mean().sqrt().clamp_min(1e-12))

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        loss = self.loss_of(batch, code)
        if self.config.contrast_coefficient == 0:
            return loss
        if batch.side is None:
            raise no_side(self)
        now, before = self._high_level(code), self._high_level(self.encode(batch.side * self.side_scale))
        alike = F.normalize(now, dim=1) @ F.normalize(before, dim=1).T / self.config.temperature
        contrast = (alike.logsumexp(1) + alike.logsumexp(0) - 2 * alike.diagonal()).mean() / 2
        total = loss.total + self.config.contrast_coefficient * contrast
        return Loss(total, {**loss.terms, "contrast": contrast.detach()}, loss.code, loss.reconstruction)

    def _high_level(self, code: SparseCode) -> Tensor:
        """``(n, size of the first group)``: these columns of a code, dense."""
        width = self.config.prefix_ends()[0]
        kept = code.indices < width
        out = code.values.new_zeros(len(code), width)
        return out.index_put((code.rows[kept], code.indices[kept].long()), code.values[kept])
