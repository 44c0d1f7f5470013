"""JumpReLU: a learned threshold for every feature, trained with straight-through estimators."""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Step
from unweave.dictionaries._linear import LinearConfig, LinearDictionary
from unweave.dictionaries.registry import register
from unweave.kernels.autograd import sparse_encode
from unweave.kernels.gradients.reference import sum_by_feature
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, Rule, reference, select


class JumpReLUConfig(LinearConfig):
    """
    Attributes:
        penalty: "target" is ``c (L0 / target_l0 - 1)^2``; "l0" is ``c L0``, as in the paper.
        target_l0: the L0 to land on (for "target"; also sets the starting thresholds).
        sparsity_coefficient: c.
        bandwidth: width of the estimator's window around each threshold, for inputs scaled to E||x||^2 = 1.
        initial_threshold: a number (the paper's is 1e-3), or None to start where twice ``target_l0`` features fire.
            The paper trains on billions of tokens, in which thresholds have time to climb; short runs do not.
        sparsity_warmup: share of training over which the penalty rises from 0.
    """

    penalty: Literal["target", "l0"] = "target"
    target_l0: PositiveFloat = 32.0
    sparsity_coefficient: PositiveFloat = 1.0
    bandwidth: PositiveFloat = 1e-3
    initial_threshold: PositiveFloat | None = None
    sparsity_warmup: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="after")
    def _target_fits(self) -> JumpReLUConfig:
        if self.penalty == "target" and self.target_l0 > self.n_features:
            raise ValueError(f"target_l0 must be at most n_features = {self.n_features}")
        return self


class _Jump(torch.autograd.Function):
    """``f = u 1[u > theta]`` and ``H = 1[u > theta]`` with rectangle-kernel pseudo-derivatives in theta.

    df/dtheta = -(theta / eps) K((u - theta) / eps), dH/dtheta = -(1 / eps) K(...), K = 1 on (-1/2, 1/2); u gets the
    true derivative of f and none from H.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u, theta)
        ctx.bandwidth = bandwidth
        fires = (u > theta).to(u.dtype)
        return u * fires, fires

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_f, grad_fires = grads
        u, theta = ctx.saved_tensors
        kernel = ((u - theta).abs() < ctx.bandwidth / 2).to(u.dtype) / ctx.bandwidth
        grad_theta = -kernel * (theta * grad_f + grad_fires)
        return grad_f * (u > theta), grad_theta, None


@register("jumprelu")
class JumpReLU(LinearDictionary):
    """``z = u 1[u > theta]``, ``theta = exp(log_threshold)`` per feature, loss ``||x - x_hat||^2 + penalty(L0)``."""

    Config = JumpReLUConfig
    citation = "Rajamanoharan et al. 2024, Jumping ahead, arXiv:2407.14435"
    good_for = "the best reconstruction at a chosen L0 in long runs; a threshold for every feature"
    betas = (0.0, 0.999)

    def __init__(self, config: JumpReLUConfig) -> None:
        super().__init__(config)
        start = config.initial_threshold or 1e-3
        self.log_threshold = nn.Parameter(torch.full((config.n_features,), start).log())

    @property
    def threshold(self) -> Tensor:
        """``(n_features,)``, in the units of the codes."""
        return self.log_threshold.exp()

    def rule(self) -> Rule:
        return AboveRule(self.threshold.detach(), 2 * self.config.target_l0)

    def training_rule(self) -> Rule:
        # Entries just below their threshold give no output but do push the threshold.
        return AboveRule(self.threshold.detach() - self.config.bandwidth / 2, 2 * self.config.target_l0)

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        return values * (values > self.threshold[pattern.indices.long()])

    def loss(self, batch: TrainingBatch) -> Loss:
        x = self.check_input(batch.input)
        centred = self.centre(x)
        threshold = self.threshold
        with torch.no_grad():
            scores = F.linear(centred, self.W_enc, self.b_enc)
            pattern = select(reference, self.training_rule(), scores)[0]
        u = sparse_encode(centred, self.W_enc, self.b_enc, scores, pattern)
        values, fires = _Jump.apply(u, threshold[pattern.indices.long()], self.config.bandwidth)  # type: ignore[misc]
        code = SparseCode.from_pattern(pattern, values)
        reconstruction = self.decode(code)
        mse = (batch.target - reconstruction).square().sum(1).mean()
        l0 = fires.sum() / max(1, len(x))
        penalty = self._penalty(l0, batch.progress)
        terms = {"mse": mse.detach(), "sparsity": penalty.detach()}
        return Loss(mse + penalty, terms, code.detach(), reconstruction.detach())

    def backward(self, step: Step) -> Backward:
        config, features, n = self.config, step.pattern.indices.long(), max(1, len(step.x))
        threshold = self.threshold.detach()
        at = threshold[features]
        fires = step.u > at
        l0 = (fires.sum().to(step.u) / n).requires_grad_()
        with torch.enable_grad():
            penalty = self._penalty(l0, step.batch.progress)
        (grad_l0,) = torch.autograd.grad(penalty, l0)
        window = ((step.u - at).abs() < config.bandwidth / 2).to(step.u.dtype) / config.bandwidth
        pushes = sum_by_feature(step.pattern, -window * (at * step.grads + grad_l0 / n))
        penalty = penalty.detach()
        return Backward(step.grads * fires, penalty, {"sparsity": penalty}, dense={"log_threshold": pushes * threshold})

    def _penalty(self, l0: Tensor, progress: float) -> Tensor:
        config = self.config
        raw = (l0 / config.target_l0 - 1).square() if config.penalty == "target" else l0
        warm = min(1.0, progress / config.sparsity_warmup) if config.sparsity_warmup else 1.0
        return config.sparsity_coefficient * warm * raw

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, target)
        if self.config.initial_threshold is None:
            scores = F.linear(self.centre(sample[:1024]), self.W_enc, self.b_enc)
            n = min(int(2 * self.config.target_l0 * len(scores)), scores.numel() - 1)
            start = scores.reshape(-1).topk(n + 1).values[-1].clamp_min(1e-3)
            self.log_threshold.fill_(float(start.log()))

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        out = scale if out_scale is None else out_scale
        self.log_threshold.sub_(torch.tensor(out).log())
