"""GBA: group bias adaptation. Biases, not a penalty, hold each group of features at a firing frequency of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary, Loss, TrainingBatch
from unweave.dictionaries._linear import LinearConfig, remove_parallel_gradient
from unweave.dictionaries.registry import register
from unweave.errors import UnweaveError
from unweave.kernels.autograd import sparse_decode, sparse_encode
from unweave.kernels.calibration import plan_for
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, reference, select
from unweave.kernels.workspace import Workspace

_NEVER = 1e-6  # a frequency below this counts as never having fired


class GBAConfig(LinearConfig):
    """
    Attributes:
        n_groups: groups of features, in order and of (nearly) equal size; 1 is plain bias adaptation.
        highest_frequency, lowest_frequency: target firing frequencies of the first and the last group; those between
            are spaced geometrically. The expected L0 is at most the sum of all features' targets.
        gate: "jump" emits ``w . (x - b_dec)`` wherever the biased score is positive; "relu" the biased score itself,
            with which hardly anything is recovered.
        adapt_every: steps between two adaptations of the biases (the paper's T).
        rate_down, rate_up: gamma- and gamma+, how far a bias moves, relative to the largest score.
        initial_bias: "quantile" starts each feature at its target frequency, "zero" at 0 as in the paper's listing. On
            planted features the quantile decided whether any was found.
        two_sided: also raise the bias of a feature that fires less than half as often as it should, where the paper
            only raises those that never fire.
    """

    n_groups: PositiveInt = 10
    highest_frequency: float = Field(0.5, gt=0, le=1)
    lowest_frequency: float = Field(1e-3, gt=0, le=1)
    gate: Literal["jump", "relu"] = "jump"
    adapt_every: PositiveInt = 50
    rate_down: PositiveFloat = 0.01
    rate_up: PositiveFloat = 0.01
    initial_bias: Literal["quantile", "zero"] = "quantile"
    two_sided: bool = False

    @model_validator(mode="after")
    def _groups_fit(self) -> GBAConfig:
        if self.n_groups > self.n_features:
            raise ValueError(f"n_groups must be at most n_features = {self.n_features}")
        if self.lowest_frequency > self.highest_frequency:
            raise ValueError(f"lowest_frequency must be at most highest_frequency = {self.highest_frequency:g}")
        return self

    def groups(self) -> Tensor:
        """``(n_features,)`` int64, the group of each feature."""
        return torch.arange(self.n_features) * self.n_groups // self.n_features

    def frequencies(self) -> Tensor:
        """``(n_features,)`` float64, the target frequency of each feature."""
        high, low = self.highest_frequency, self.lowest_frequency
        steps = self.groups().double() / max(1, self.n_groups - 1)
        return high * (low / high) ** steps


@dataclass(frozen=True)
class _Watched(Loss):
    """A loss that also says what the biases follow: ``(n_features,)`` firings and largest biased scores."""

    fired: Tensor | None = None
    peaks: Tensor | None = None


@register("gba")
class GBA(Dictionary):
    """``x_hat = sum a_m w_m z_m + b_dec`` with ``z_m = w_m.(x - b_dec)`` where ``y_m = w_m.(x - b_dec) + b_m > 0``.

    One unit vector w_m is both encoder and atom, a_m a free output scale (part of the code here, so that atoms have
    norm 1). The loss is ``||x - x_hat||^2`` alone and b_m gets no gradient. Every T steps, with p_m the frequency of
    ``y_m > 0`` since the last time, r_m the largest ``y_m`` (at least 0) and s the mean of the positive r in the
    group::

        p_m > target of the group:   b_m <- max(b_m - gamma- r_m, -1)
        p_m < 1e-6:                  b_m <- min(b_m + gamma+ s, 0)

    (A review reports max and min swapped in the paper's listing.) Biases live in [-1, 0], which suits inputs scaled to
    E||x||^2 = 1.
    """

    Config = GBAConfig
    citation = (
        "Chen, Sheen, Xiong, Wang, Yang 2026, Taming polysemanticity in LLMs: provable feature recovery via sparse "
        "autoencoders, ICLR, arXiv:2506.14002"
    )
    good_for = "recovering features with guarantees, where firing rates can be bounded; no penalty to tune"

    bias: Tensor
    fired: Tensor
    peaks: Tensor
    n_rows: Tensor
    n_steps: Tensor

    def __init__(self, config: GBAConfig) -> None:
        super().__init__(config)
        if config.d_in != config.d_out:
            raise UnweaveError(
                f"{self.name}: encoder and atoms are the same vectors, so d_in must equal d_out, found {config.d_in} "
                f"and {config.d_out}"
            )
        m = config.n_features
        self.W_dec = nn.Parameter(F.normalize(torch.randn(m, config.d_out), dim=1))
        self.amplitude = nn.Parameter(torch.ones(m))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        self.register_buffer("bias", torch.zeros(m))
        self.register_buffer("fired", torch.zeros(m, dtype=torch.long))
        self.register_buffer("peaks", torch.zeros(m))
        self.register_buffer("n_rows", torch.tensor(0))
        self.register_buffer("n_steps", torch.tensor(0))

    def centre(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.config.subtract_bias else x

    def rule(self) -> AboveRule:
        """In terms of ``w . (x - b_dec)``."""
        return AboveRule(-self.bias, float(self.config.frequencies().sum()))

    def encode(self, x: Tensor) -> SparseCode:
        x = self.check_input(x)
        if torch.is_grad_enabled():
            pattern, scores = self._entries(self.centre(x))
        else:
            work = Workspace(plan_for(self.W_dec, len(x)), x.device)
            pattern, scores = work.select(self.rule(), self.centre(x), self.W_dec, torch.zeros_like(self.bias))
        return self._code(pattern, scores)

    def _entries(self, x: Tensor) -> tuple[Pattern, Tensor]:
        nothing = torch.zeros_like(self.bias)
        with torch.no_grad():
            scores = F.linear(x, self.W_dec)
            pattern = select(reference, self.rule(), scores)[0]
        return pattern, sparse_encode(x, self.W_dec, nothing, scores, pattern)

    def _code(self, pattern: Pattern, scores: Tensor) -> SparseCode:
        features = pattern.indices.long()
        emitted = scores if self.config.gate == "jump" else scores + self.bias[features]
        return SparseCode.from_pattern(pattern, self.amplitude[features] * emitted)

    def decode(self, code: SparseCode) -> Tensor:
        code = self.check_code(code)
        return sparse_decode(code.values.to(self.W_dec.dtype), self.W_dec, code.pattern) + self.b_dec

    def decoder_directions(self) -> Tensor:
        return self.W_dec.detach()

    def loss(self, batch: TrainingBatch) -> Loss:
        pattern, scores = self._entries(self.centre(self.check_input(batch.input)))
        code = self._code(pattern, scores)
        reconstruction = self.decode(code)
        mse = (batch.target - reconstruction).square().sum(1).mean()
        with torch.no_grad():
            features = pattern.indices.long()
            fired = torch.bincount(features, minlength=self.n_features)
            biased = scores.detach() + self.bias[features]
            peaks = torch.zeros_like(self.peaks).scatter_reduce_(0, features, biased, "amax")
        return _Watched(mse, {"mse": mse.detach()}, code.detach(), reconstruction.detach(), fired, peaks)

    # ---- hooks of the trainer ---------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        self.b_dec.copy_(target.float().mean(0))
        if self.config.initial_bias == "quantile":
            scores = F.linear(self.centre(sample[:4096]), self.W_dec)
            places = ((1 - self.config.frequencies()) * (len(scores) - 1)).round().long().to(scores.device)
            self.bias.copy_(-scores.sort(dim=0).values.gather(0, places[None]).squeeze(0)).clamp_(-1, 0)

    @torch.no_grad()
    def before_step(self) -> None:
        remove_parallel_gradient(self.W_dec)

    @torch.no_grad()
    def after_step(self, loss: Loss, progress: float) -> None:
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))
        if not isinstance(loss, _Watched) or loss.fired is None or loss.peaks is None or loss.code is None:
            return
        self.fired.add_(loss.fired)
        torch.maximum(self.peaks, loss.peaks, out=self.peaks)
        self.n_rows.add_(len(loss.code))
        self.n_steps.add_(1)
        if int(self.n_steps) % self.config.adapt_every == 0:
            self.adapt()

    @torch.no_grad()
    def adapt(self) -> None:
        """Move the biases by what was counted since the last time, and count anew."""
        config, device = self.config, self.bias.device
        frequency = self.fired / self.n_rows.clamp_min(1)
        wanted, groups = config.frequencies().to(device), config.groups().to(device)
        alive = (self.peaks > 0).to(self.peaks)
        sums, counts = (torch.zeros(config.n_groups, device=device, dtype=self.peaks.dtype) for _ in range(2))
        sums.index_add_(0, groups, self.peaks * alive)
        counts.index_add_(0, groups, alive)
        typical = (sums / counts.clamp_min(1))[groups]
        lowest = wanted / 2 if config.two_sided else torch.full_like(wanted, _NEVER)
        lower, raise_ = frequency > wanted, frequency < lowest
        self.bias.copy_(torch.where(lower, (self.bias - config.rate_down * self.peaks).clamp_min(-1), self.bias))
        self.bias.copy_(torch.where(raise_, (self.bias + config.rate_up * typical).clamp_max(0), self.bias))
        for counter in (self.fired, self.peaks, self.n_rows):
            counter.zero_()

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        # w.(scale x - b) + bias > 0 wherever w.(x - b / scale) + bias / scale > 0
        out = scale if out_scale is None else out_scale
        self.bias.div_(scale)
        self.amplitude.mul_(scale / out)
        self.b_dec.div_(out)
