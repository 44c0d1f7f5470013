"""BatchTopK: k features a row on average, chosen over the whole batch."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from unweave.dictionaries._base import Loss
from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.kernels.select import AboveRule, BatchTopKRule, Rule, TopKRule

_A_LITTLE_LESS = 0.95  # batches differ; a guess that is too high costs a second pass


class BatchTopKConfig(TopKConfig):
    """
    Attributes:
        threshold_rate: how fast the inference threshold follows the batch threshold (1 - beta of its moving average);
            early on it follows faster, over the last fifth of the steps so far, so that short runs get theirs right.
    """

    threshold_rate: float = Field(0.01, gt=0, le=1)


@register("batch_topk")
class BatchTopK(TopK):
    """Training keeps the ``k n`` largest of ``ReLU(u)`` in a batch of ``n``; inference keeps ``u > threshold``.

    The threshold is a moving average of the smallest value kept in training, so in eval mode a row's code does not
    depend on its neighbours. Before any training step, eval mode falls back to TopK by row.
    """

    Config = BatchTopKConfig
    citation = "Bussmann, Leask, Nanda 2024, BatchTopK sparse autoencoders, arXiv:2412.06410"
    good_for = "the default: rows take as many features as they need, k on average"

    threshold: Tensor
    n_updates: Tensor

    def __init__(self, config: BatchTopKConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.register_buffer("n_updates", torch.tensor(0))

    def rule(self) -> Rule:
        threshold = float(self.threshold)
        if self.training:
            return BatchTopKRule(self.config.k, bound=_A_LITTLE_LESS * threshold if threshold > 0 else None)
        return AboveRule(threshold, 2 * self.config.k) if threshold >= 0 else TopKRule(self.config.k)

    @torch.no_grad()
    def observe(self, loss: Loss, progress: float) -> None:
        assert loss.code is not None
        if loss.code.nnz:
            self.follow(loss.code.values.min())

    def follow(self, smallest: Tensor) -> None:
        """Move the threshold towards what was the smallest one kept in a batch."""
        rate = max(self.config.threshold_rate, 5 / (5 + int(self.n_updates)))
        self.threshold.lerp_(smallest.to(self.threshold.dtype), rate)
        self.n_updates.add_(1)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        if float(self.threshold) >= 0:
            self.threshold.div_(scale if out_scale is None else out_scale)
