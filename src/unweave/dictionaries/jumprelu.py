"""JumpReLU: a learned threshold for every feature, trained with straight-through estimators."""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch, warm
from unweave.dictionaries._closed_form import Backward, Step
from unweave.dictionaries._linear import LinearConfig, LinearDictionary
from unweave.dictionaries.registry import register
from unweave.kernels.autograd import sparse_encode
from unweave.kernels.gradients.reference import Extra, sum_by_feature
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, Rule, reference, select


class JumpReLUConfig(LinearConfig):
    """
    Attributes:
        penalty: "target" is ``c (L0 / target_l0 - 1)^2``; "l0" is ``c L0``, as in the paper; "tanh" is
            ``c sum_i tanh(s z_i)``, L0 where z is large and L1 where it is small (Anthropic, January 2025).
        target_l0: the L0 to land on (for "target"; also sets the starting thresholds).
        tanh_scale: s. None: ``4 sqrt(d_in)``, that is 4 where E||x|| = sqrt(d).
        sparsity_coefficient: c.
        bandwidth: width of the estimator's window around each threshold, for inputs scaled to E||x||^2 = 1.
        initial_threshold: a number (the paper's is 1e-3), or None to start where twice ``target_l0`` features fire.
            The paper trains on billions of tokens, in which thresholds have time to climb; short runs do not.
        sparsity_warmup: share of training over which the penalty rises from 0.
        dead_coefficient: p in ``p sum_i max(0, theta_i - u_i)`` over the dead features, which draws thresholds and
            pre-activations together until they fire again. None: 0, but for "tanh" ``3e-6 / sqrt(d_in)``, that is
            3e-6 where E||x|| = sqrt(d).
    """

    penalty: Literal["target", "l0", "tanh"] = "target"
    target_l0: PositiveFloat = 32.0
    tanh_scale: PositiveFloat | None = None
    sparsity_coefficient: PositiveFloat = 1.0
    bandwidth: PositiveFloat = 1e-3
    initial_threshold: PositiveFloat | None = None
    sparsity_warmup: float = Field(0.05, ge=0, le=1)
    dead_coefficient: float | None = Field(None, ge=0)

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
    """``z = u 1[u > theta]``, ``theta = exp(log_threshold)`` per feature, loss ``||x - x_hat||^2 + penalty(L0)``.

    Atoms have unit norm, so that the norms by which Anthropic's variant weighs its terms are all 1.
    """

    Config = JumpReLUConfig
    good_for = "the best reconstruction at a chosen L0 in long runs; a threshold for every feature"
    citation = (
        "Rajamanoharan et al. 2024, Jumping ahead, arXiv:2407.14435; tanh: Anthropic, circuits updates January 2025"
    )
    betas = (0.0, 0.999)

    def __init__(self, config: JumpReLUConfig) -> None:
        super().__init__(config)
        start = config.initial_threshold or 1e-3
        self.log_threshold = nn.Parameter(torch.full((config.n_features,), start).log())

    @property
    def threshold(self) -> Tensor:
        """``(n_features,)``, in the units of the codes."""
        return self.log_threshold.exp()

    @property
    def bandwidth(self) -> float:
        """Of the estimator's window, in the units of the codes."""
        return self.config.bandwidth

    def rule(self) -> Rule:
        return AboveRule(self.threshold.detach(), 2 * self.config.target_l0)

    def training_rule(self) -> Rule:
        # Entries just below their threshold give no output but do push the threshold. The window is narrower than
        # bfloat16's steps: by its scores thresholds came out too high (L0 0.2 % lower, FVU 0.15 % higher; 72 seeds).
        return AboveRule(self.threshold.detach() - self.bandwidth / 2, 2 * self.config.target_l0, fine=True)

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
        values, fires = _Jump.apply(u, threshold[pattern.indices.long()], self.bandwidth)  # type: ignore[misc]
        code = SparseCode.from_pattern(pattern, values)
        trained, mse, reconstruction = self.errors(code, batch.target)
        penalty = self._penalty(values, fires, len(x), batch.progress)
        terms = {"mse": mse.detach(), "sparsity": penalty.detach()}
        total = trained + penalty
        if self._dead_coefficient:
            lost = self._lost(centred.detach(), batch.dead)
            terms["dead"], total = lost.detach(), total + lost
        return Loss(total, terms, code.detach(), reconstruction.detach())

    def backward(self, step: Step) -> Backward:
        features, bandwidth = step.pattern.indices.long(), self.bandwidth
        threshold = self.threshold.detach()
        at = threshold[features]
        fires = step.u > at
        values, fired = step.values.detach().requires_grad_(), fires.to(step.u).requires_grad_()
        with torch.enable_grad():
            penalty = self._penalty(values, fired, len(step.x), step.batch.progress)
        by_value, by_firing = torch.autograd.grad(penalty, (values, fired), materialize_grads=True)
        grads = step.grads + by_value
        window = ((step.u - at).abs() < bandwidth / 2).to(step.u.dtype) / bandwidth
        pushes = sum_by_feature(step.pattern, -window * (at * grads + by_firing))
        penalty = penalty.detach()
        back = Backward(grads * fires, penalty, {"sparsity": penalty}, dense={"log_threshold": pushes * threshold})
        if self._dead_coefficient:
            self._add_lost(back, step)
        return back

    def _penalty(self, values: Tensor, fires: Tensor, n: int, progress: float) -> Tensor:
        config = self.config
        if config.penalty == "tanh":
            scale = config.tanh_scale or 4 * self.d_in**0.5
            raw = (scale * values).tanh().sum() / max(1, n)
        else:
            l0 = fires.sum() / max(1, n)
            raw = (l0 / config.target_l0 - 1).square() if config.penalty == "target" else l0
        return config.sparsity_coefficient * warm(progress, config.sparsity_warmup) * raw

    # ---- features that fell silent ----------------------------------------------------------------------------

    @property
    def _dead_coefficient(self) -> float:
        given, default = self.config.dead_coefficient, 3e-6 / self.d_in**0.5 if self.config.penalty == "tanh" else 0.0
        return default if given is None else given

    def _lost(self, centred: Tensor, dead: Tensor | None) -> Tensor:
        """How far dead features are from firing, summed over them and averaged over rows."""
        at = dead.nonzero().squeeze(1) if dead is not None else None
        if at is None or len(at) == 0:
            return centred.new_zeros(())
        u = F.linear(centred, self.W_enc[at], self.b_enc[at])
        return self._dead_coefficient * F.relu(self.threshold[at] - u).sum() / max(1, len(centred))

    def _add_lost(self, back: Backward, step: Step) -> None:
        """The same with its gradients, on the rows of the dead features alone."""
        dead = step.batch.dead
        at = dead.nonzero().squeeze(1) if dead is not None else step.pattern.offsets.new_zeros(0)
        W_enc, b_enc, threshold = self.W_enc.detach()[at], self.b_enc.detach()[at], self.threshold.detach()
        short = F.relu(threshold[at] - step.work.product(step.x, W_enc.T) - b_enc)
        weight = self._dead_coefficient / max(1, len(step.x))
        below = (short > 0).to(step.x) * weight
        place = torch.full((self.n_features,), -1, dtype=torch.long, device=at.device)
        place[at] = torch.arange(len(at), device=at.device)
        back.encoder = Extra(place, -step.work.product(below.T, step.x))
        back.b_enc = below.new_zeros(self.n_features).index_copy_(0, at, -below.sum(0))
        back.dense["log_threshold"] = back.dense["log_threshold"].index_add(0, at, below.sum(0) * threshold[at])
        back.terms["dead"] = weight * short.sum()
        back.total = back.total + back.terms["dead"]

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, target)
        self._start_thresholds(sample)

    def read_from_mean(self, sample: Tensor) -> None:
        super().read_from_mean(sample)
        self._start_thresholds(sample)

    def _start_thresholds(self, sample: Tensor) -> None:
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
