"""Temporal dictionaries: the features of the first group should change slowly from token to token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch
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

    subtract_bias: bool = False
    group_fractions: tuple[float, ...] = Field((0.2, 0.8), min_length=1)
    contrast_coefficient: float = Field(0.5, ge=0)
    temperature: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _pairs(self) -> TemporalConfig:
        if self.d_in != 2 * self.d_out:
            raise ValueError(
                f"rows are pairs [x_t, x_(t-1)] and the target is x_t: expected d_in = 2 d_out, found d_in = "
                f"{self.d_in} and d_out = {self.d_out}. Give target=rows[:, :d]"
            )
        if self.subtract_bias:
            raise ValueError("subtract_bias must be False: input and target have scales of their own")
        return self


@register("temporal")
class Temporal(Matryoshka):
    """Matryoshka on ``x_t`` plus ``alpha`` times a contrastive loss between the high-level codes of ``x_t, x_(t-1)``.

    With h the codes of the first group and s the cosine, ``L = -1/(2n) sum_i (log softmax_j s(h_t^i, h_(t-1)^j)[i] +
    log softmax_j s(h_t^j, h_(t-1)^i)[i])``: of all tokens of the batch, a token's predecessor should be the most like
    it. What goes on over many tokens (a topic, a language) then moves into the first group, and what belongs to one
    token into the others.

    Input rows are pairs ``[x_t, x_(t-1)]`` (a token and the one before it), the target is ``x_t``. The code is that of
    ``x_t`` alone: :meth:`encode` takes pairs, or plain rows ``x_t`` where there is no model of time to train. Pairs in
    place of whole sequences, a batch threshold worked out for each side, and both sides learning are our choices.
    """

    Config = TemporalConfig
    citation = "Bhalla, Oesterling et al. 2025, Temporal sparse autoencoders, arXiv:2511.05541"

    def __init__(self, config: TemporalConfig) -> None:
        super().__init__(config)
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())  # reads x_t

    def check_input(self, x: Tensor) -> Tensor:
        if x.ndim == 2 and x.shape[1] == self.d_out:
            x = F.pad(x, (0, self.d_out))
        return super().check_input(x)

    def centre(self, x: Tensor) -> Tensor:
        return x[:, : self.d_out]

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        loss = self.loss_of(batch, code)
        if self.config.contrast_coefficient == 0:
            return loss
        now, before = self._high_level(code), self._high_level(self.encode(batch.input[:, self.d_out :]))
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

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, target)
        now = self.centre(sample)
        # As if the bias were subtracted; and x_t is but a part of a row whose whole has unit norm.
        self.W_enc.mul_((target.square().sum() / now.square().sum().clamp_min(1e-24)).sqrt())
        self.b_enc.copy_(-now.mean(0) @ self.W_enc.T)
