"""Multi-TopK: a second look at the reconstruction from four times as many features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries.hierarchical_topk import ranked, ranks
from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.kernels.autograd import sparse_decode, sparse_encode
from unweave.kernels.pattern import Pattern
from unweave.kernels.select.reference import select_topk


class MultiTopKConfig(TopKConfig):
    """
    Attributes:
        multiple: how many times k the second reconstruction may use (at most all features).
        multi_coefficient: weight of its squared error in the loss.
    """

    multiple: PositiveInt = 4
    multi_coefficient: float = Field(1 / 8, ge=0)


@register("multi_topk")
class MultiTopK(TopK):
    """TopK with the loss ``L(k) + L(4k) / 8 + AuxK / 32``, L(k) being ``||x - x_hat||^2`` from the k largest values.

    A plain TopK dictionary reconstructs badly with more features than it was trained for; this one goes on improving.
    """

    Config = MultiTopKConfig
    citation = TopK.citation
    good_for = "a dictionary that bears more or fewer features a row than it was trained with"

    def loss(self, batch: TrainingBatch) -> Loss:
        config = self.config
        pattern, values, order = self._widest(batch.input)
        head, own = ranks(pattern, values, order, 0, config.k)
        tail, more = ranks(pattern, values, order, config.k, order.shape[1])
        code = SparseCode.from_pattern(head, own)
        mse, _, reconstruction = self.errors(code, batch.target)
        residual = batch.target - reconstruction
        multi = (residual - sparse_decode(more, self.W_dec, tail)).square().sum(1).mean()
        auxk = auxk_loss(self, batch.input, residual, batch.dead, self._k_aux)
        total = mse + config.multi_coefficient * multi + config.auxk_coefficient * auxk
        terms = {"mse": mse.detach(), "multi": multi.detach(), "auxk": auxk.detach()}
        return Loss(total, terms, code.detach(), reconstruction.detach())

    def _widest(self, x: Tensor) -> tuple[Pattern, Tensor, Tensor]:
        """The ``multiple * k`` largest of every row, their values in order, and that order."""
        centred = self.centre(self.check_input(x))
        with torch.no_grad():
            scores = F.linear(centred, self.W_enc, self.b_enc)
            pattern = select_topk(scores, self.config.multiple * self.config.k)
        values = F.relu(sparse_encode(centred, self.W_enc, self.b_enc, scores, pattern))
        return pattern, *ranked(values, len(x))
