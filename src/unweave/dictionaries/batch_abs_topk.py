"""BatchAbsTopK: the largest magnitudes of a whole batch, of either sign; the form in which AbsTopK was trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.dictionaries._base import Loss
from unweave.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from unweave.dictionaries.registry import register
from unweave.kernels.autograd import sparse_encode
from unweave.kernels.pattern import Pattern
from unweave.kernels.select.reference import select_above, select_batch_topk, select_topk


class BatchAbsTopKConfig(BatchTopKConfig):
    """
    Attributes:
        encoder_bias: learn b_enc; the released code has none.
        relative: rank entries by ``|u| / ||x - b_dec||`` instead of ``|u|``.
    """

    encoder_bias: bool = False
    relative: bool = True


@register("batch_abs_topk")
class BatchAbsTopK(BatchTopK):
    """Training keeps the ``k n`` entries of ``n`` rows with the largest ``|u| / ||x - b_dec||``, inference those above
    a threshold.

    Values keep their signs and size. The paper standardises every row; dividing by the row's length ranks as that does,
    and codes stay in the units of the rows. Ranked by ``|u|`` alone (``relative=False``), long rows take the budget of
    short ones, which is no matter where rows are of about one length, and costs much where they are not: signed
    features cannot shut out interference by a bias. The threshold is a moving average of the smallest rank kept in
    training; the paper says nothing of inference. See :class:`~unweave.dictionaries.abs_topk.AbsTopK` for the form that
    chooses by row.
    """

    Config = BatchAbsTopKConfig
    citation = "Zhu, Khalili, Zhu 2026, AbsTopK: rethinking sparse autoencoders for bidirectional features, ICLR"
    good_for = "signed features with a budget for the batch, where rows need unequal numbers"
    signed = True

    def __init__(self, config: BatchAbsTopKConfig) -> None:
        super().__init__(config)
        self.b_enc.requires_grad_(config.encoder_bias)
        self._smallest: Tensor | None = None  # of the present step, from its selection to its end

    def _entries(self, x: Tensor) -> tuple[Pattern, Tensor]:
        centred = self.centre(x)
        with torch.no_grad():
            scores = F.linear(centred, self.W_enc, self.b_enc)
            lengths = centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(centred.dtype).tiny)
            pattern = self.select(scores / lengths if self.config.relative else scores)
        return pattern, sparse_encode(centred, self.W_enc, self.b_enc, scores, pattern)

    def select(self, scores: Tensor) -> Pattern:
        ranks, threshold = scores.abs(), float(self.threshold)
        if not self.training:
            return select_above(ranks, threshold) if threshold >= 0 else select_topk(ranks, self.config.k)
        pattern = select_batch_topk(ranks, self.config.k)
        self._smallest = ranks.reshape(-1)[pattern.flat].min() if len(pattern.indices) else None
        return pattern

    @torch.no_grad()
    def observe(self, loss: Loss, progress: float) -> None:
        smallest, self._smallest = self._smallest, None
        if smallest is not None:
            self.follow(smallest)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        if self.config.relative and float(self.threshold) >= 0:
            self.threshold.mul_(scale)  # u is divided by out_scale, and so was the threshold; lengths are by scale
