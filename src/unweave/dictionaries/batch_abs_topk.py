"""BatchAbsTopK: the largest magnitudes of a whole batch, of either sign; the form in which AbsTopK was trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss
from unweave.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from unweave.dictionaries.registry import register
from unweave.kernels.pattern import Pattern
from unweave.kernels.select.reference import select_above, select_batch_topk, select_topk


class BatchAbsTopKConfig(BatchTopKConfig):
    """
    Attributes:
        encoder_bias: learn b_enc; the released code has none.
    """

    encoder_bias: bool = False


@register("batch_abs_topk")
class BatchAbsTopK(BatchTopK):
    """Training keeps the ``k n`` entries of a batch of ``n`` with the largest ``|u|``; inference ``|u| > threshold``.

    Values keep their signs. The threshold is a moving average of the smallest magnitude kept in training; the paper
    says nothing of inference. See :class:`~unweave.dictionaries.abs_topk.AbsTopK` for the form that chooses by row.
    """

    Config = BatchAbsTopKConfig
    citation = "Zhu, Khalili, Zhu 2026, AbsTopK: rethinking sparse autoencoders for bidirectional features, ICLR"
    good_for = "signed features with a budget for the batch, where rows need unequal numbers"
    signed = True

    def __init__(self, config: BatchAbsTopKConfig) -> None:
        super().__init__(config)
        self.b_enc.requires_grad_(config.encoder_bias)

    def select(self, scores: Tensor) -> Pattern:
        magnitudes, threshold = scores.abs(), float(self.threshold)
        if self.training:
            return select_batch_topk(magnitudes, self.config.k)
        return select_above(magnitudes, threshold) if threshold >= 0 else select_topk(magnitudes, self.config.k)

    @torch.no_grad()
    def observe(self, loss: Loss, progress: float) -> None:
        assert loss.code is not None
        magnitudes = SparseCode.from_pattern(loss.code.pattern, loss.code.values.abs())
        super().observe(replace(loss, code=magnitudes), progress)
