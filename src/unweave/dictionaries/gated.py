"""Gated: one half of the encoder says which features fire, the other how strongly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._anneal import AnnealConfig, Annealed
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Step
from unweave.dictionaries._linear import LinearConfig
from unweave.dictionaries.registry import register
from unweave.kernels.autograd import sparse_decode
from unweave.kernels.gradients.reference import sum_by_feature
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, Rule


class GatedConfig(AnnealConfig, LinearConfig):
    """
    Attributes:
        sparsity_coefficient: lambda, for inputs scaled to E||x||^2 = 1.
        p_end: 1 is the L1 penalty of the paper; below 1 the penalty is annealed as in p-anneal ("Gated-anneal").
    """

    sparsity_coefficient: PositiveFloat = 0.04
    p_end: float = Field(1.0, gt=0, le=1)


@register("gated")
class Gated(Annealed):
    """``z = 1[u > 0] ReLU(exp(r) (u - b_enc) + b_mag)`` with ``u = (x - b_dec) W_enc^T + b_enc``.

    The loss is ``||x - x_hat||^2 + lambda ||ReLU(u)||_1 + ||x - x_hat_gate||^2``, where ``x_hat_gate`` is decoded from
    ``ReLU(u)`` with a frozen copy of the decoder. Only the gate u pays the penalty, so that values are not shrunk by
    it, and only the frozen decoder teaches the gate, which has no other gradient.
    """

    Config = GatedConfig
    citation = (
        "Rajamanoharan et al. 2024, Improving dictionary learning with gated sparse autoencoders, arXiv:2404.16014"
    )
    good_for = "L1 without shrinkage: one path says whether, the other how much"
    betas = (0.0, 0.999)
    lr_at_16k = 3e-4

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.log_magnitude = nn.Parameter(torch.zeros(config.n_features))
        self.b_mag = nn.Parameter(torch.zeros(config.n_features))

    def rule(self) -> Rule:
        return AboveRule(0.0)

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        at = pattern.indices.long()
        return F.relu(self.log_magnitude.exp()[at] * (values - self.b_enc[at]) + self.b_mag[at])

    def loss(self, batch: TrainingBatch) -> Loss:
        pattern, gate = self._entries(self.check_input(batch.input))
        code = SparseCode.from_pattern(pattern, self.activate(gate, pattern))
        trained, mse, reconstruction = self.errors(code, batch.target)
        frozen = sparse_decode(gate, self.W_dec.detach(), pattern) + self.b_dec.detach()
        aux = (batch.target - frozen).square().sum(1).mean()
        now, _, following = self.powers(gate, len(code))
        penalty = self.coefficient(batch.progress) * now
        terms = {"mse": mse, "gate": aux, "sparsity": penalty, "lp": now, "lp_next": following}
        detached = {name: term.detach() for name, term in terms.items()}
        return Loss(trained + penalty + aux, detached, code.detach(), reconstruction.detach())

    def backward(self, step: Step) -> Backward:
        pattern, u, n = step.pattern, step.u, max(1, len(step.x))
        at = pattern.indices.long()
        gain, centred = self.log_magnitude.detach().exp()[at], u - self.b_enc.detach()[at]
        by_magnitude = step.grads * (step.values > 0)
        decode = step.work.ops.decode.decode_residual
        W_dec, b_dec = self.W_dec.detach(), self.b_dec.detach()
        _, by_gate, squares = decode(pattern, u, W_dec, b_dec, step.batch.target, 2 / n)
        aux = squares.sum() / n
        now, slopes, following = self.powers(u, len(step.x))
        coefficient = self.coefficient(step.batch.progress)
        penalty, through = coefficient * now, by_magnitude * gain
        return Backward(
            through + by_gate + coefficient * slopes,
            penalty + aux,
            {"gate": aux, "sparsity": penalty, "lp": now, "lp_next": following},
            {
                "log_magnitude": sum_by_feature(pattern, through * centred),
                "b_mag": sum_by_feature(pattern, by_magnitude),
            },
            b_enc=-sum_by_feature(pattern, through),  # the magnitude does not see the gate's bias
        )

    def read_from_mean(self, sample: Tensor) -> None:
        super().read_from_mean(sample)
        self.b_mag.copy_(self.b_enc)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.b_mag.div_(scale if out_scale is None else out_scale)
