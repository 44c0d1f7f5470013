"""vSAE: a variational sparse autoencoder, whose codes are Gaussian while it is trained."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._base import Loss, TrainingBatch, warm
from unweave.dictionaries._linear import LinearDictionary
from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.kernels.autograd import sparse_encode
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Rule, TopKRule, reference, select


class VSAEConfig(TopKConfig):
    """
    Attributes:
        beta: weight of the KL divergence, in the paper's units (see the class).
        kl_warmup: share of training over which that weight rises from 0.
        variance: "fixed" at the prior's, or "learned" from the input.
        sampling: draw the code in training. False is what the code behind the paper's numbers did (see the class).
        kl_on: "all" features, as written, or only the "selected" ones of each row (the masked-KL trainer).
        selection: the k largest by "value", as written, or by "magnitude", with signed values (the final trainer).
        scale_kl: multiply the KL by the mean atom norm (the early trainer).
        unit_atoms: keep atoms on the unit sphere and start as TopK does. As written atoms are free and start at norm
            0.1: they have to shrink, or the noise of the k features that win drowns the rows.
        relu_mean: put the mean through a ReLU before sampling, as the released trainers do.
        prior_std: of the prior, in the units of the pre-activations. None: ``1 / sqrt(d_in)``, which is the paper's 1
            for inputs scaled to E||x||^2 = 1 rather than d_in.
        initial_log_variance: of the learned variance relative to the prior's (the final trainer begins at -2).
        log_variance_range: to clamp it to (the final trainer's is (-6, 2)); None for no clamp, as written.
    """

    beta: NonNegativeFloat = 1.0
    kl_warmup: float = Field(0.1, ge=0, le=1)
    variance: Literal["fixed", "learned"] = "fixed"
    sampling: bool = True
    kl_on: Literal["all", "selected"] = "all"
    selection: Literal["value", "magnitude"] = "value"
    scale_kl: bool = False
    unit_atoms: bool = False
    relu_mean: bool = False
    prior_std: PositiveFloat | None = None
    initial_log_variance: float = 0.0
    log_variance_range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _range_rises(self) -> VSAEConfig:
        if self.log_variance_range is not None and self.log_variance_range[0] >= self.log_variance_range[1]:
            raise ValueError(f"log_variance_range must rise, found {self.log_variance_range}")
        return self


@register("vsae")
class VSAE(TopK):
    """``z = TopK_k(mu + sigma eps)`` in training, ``TopK_k(mu)`` after it; loss ``||x - x_hat||^2 + beta KL + AuxK``.

    ``mu = W_enc (x - b_dec) + b_enc``, sigma fixed or learned, ``eps ~ N(0, I)`` from torch's global generator, ``KL =
    1/2 sum_i (mu_i^2 + sigma_i^2 - 1 - log sigma_i^2)`` summed over features and averaged over rows. Here inputs are
    scaled to E||x||^2 = 1, so mu and sigma are counted in prior standard deviations s, and beta is multiplied by s^2:
    the paper's loss for rows of squared norm d, divided by d. With fixed sigma what is left is ``beta/2 ||mu||^2``.

    The authors' own erratum says that the checkpoints they evaluated had a fixed variance and, in that case, code that
    does not sample at all: TopK with an L2 penalty on activations, without AuxK, against a baseline with it. Here fixed
    variance does sample, as the paper writes, unless ``sampling`` is off. With beta = 0, s -> 0 and unit atoms this is
    TopK. After training atoms keep their free norms: taking them into the codes would change which k are largest.
    """

    Config = VSAEConfig
    citation = "Baker, Li 2025, Analysis of variational sparse autoencoders, arXiv:2509.22994"
    good_for = "a prior on the code; mostly for comparison, since it costs reconstruction"

    std: Tensor

    def __init__(self, config: VSAEConfig) -> None:
        super().__init__(config)
        self.signed = config.selection == "magnitude"  # pyright: ignore[reportAttributeAccessIssue]
        self.register_buffer("std", torch.tensor(config.prior_std or config.d_in**-0.5))
        if not config.unit_atoms:
            with torch.no_grad():
                self.W_dec.mul_(0.1)
                self.W_enc.mul_(0.1)
        if config.variance == "learned":
            # Rows of unit norm are 1 / sqrt(d) of the paper's: sqrt(d) times its Kaiming start says the same of them.
            weights = torch.empty(config.n_features, config.d_in)
            self.W_var = nn.Parameter(nn.init.kaiming_uniform_(weights, a=5**0.5) * config.d_in**0.5)
            self.b_var = nn.Parameter(torch.full((config.n_features,), config.initial_log_variance))

    @property
    def unit_norm(self) -> bool:
        return self.config.unit_atoms

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        if self.config.unit_atoms:
            super().initialise(sample, target)
        else:
            LinearDictionary.initialise(self, sample, target)  # the encoder stays the decoder's transpose

    def rule(self) -> Rule:
        return TopKRule(self.config.k, signed=self.signed and not self.config.relu_mean)

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        return super().activate(F.relu(values) if self.config.relu_mean else values, pattern)

    def encode(self, x: Tensor) -> SparseCode:
        if not self.training:
            return super().encode(x)
        pattern, sampled, _ = self.sample(self.centre(self.check_input(x)))
        return SparseCode.from_pattern(pattern, sampled if self.signed else F.relu(sampled))

    def sample(self, x: Tensor) -> tuple[Pattern, Tensor, Tensor]:
        """The entries of a sampled code of centred rows, its values, and the means at the entries, ``(nnz,)`` each."""
        with torch.no_grad():
            scores = F.linear(x, self.W_enc, self.b_enc)
            noise = torch.randn_like(scores) * self.std if self.config.sampling else torch.zeros_like(scores)
            if self.config.variance == "learned":
                log_variance = F.linear(x, self.W_var, self.b_var)
                noise_scale = (self._clamped(log_variance) / 2).exp()
                noisy = self._mean(scores) + noise * noise_scale
            else:
                log_variance = scores
                noisy = self._mean(scores) + noise
            pattern = select(reference, TopKRule(self.config.k, signed=self.signed), noisy)[0]
        means = self._mean(sparse_encode(x, self.W_enc, self.b_enc, scores, pattern))
        drawn = noise.reshape(-1)[pattern.flat]
        if self.config.variance == "learned":
            at = self._clamped(sparse_encode(x, self.W_var, self.b_var, log_variance, pattern))
            drawn = drawn * (at / 2).exp()
        return pattern, means + drawn, means

    def loss(self, batch: TrainingBatch) -> Loss:
        config, x = self.config, self.centre(self.check_input(batch.input))
        pattern, sampled, means = self.sample(x)
        code = SparseCode.from_pattern(pattern, sampled if self.signed else F.relu(sampled))
        reconstruction = self.decode(code)
        residual = batch.target - reconstruction
        mse = residual.square().sum(1).mean()
        auxk = auxk_loss(self, batch.input, residual, batch.dead, self._k_aux, signed=self.signed)
        kl = self._kl(x, pattern, means) / max(1, len(x)) if config.beta else mse.new_zeros(())
        kl = kl * self.W_dec.norm(dim=1).mean() if config.scale_kl else kl
        beta = config.beta * warm(batch.progress, config.kl_warmup)
        total = mse + config.auxk_coefficient * auxk + beta * self.std.square() * kl
        terms = {"mse": mse.detach(), "auxk": auxk.detach(), "kl": kl.detach()}
        return Loss(total, terms, code.detach(), reconstruction.detach())

    def _kl(self, x: Tensor, pattern: Pattern, means: Tensor) -> Tensor:
        """Summed over rows and features."""
        every = self.config.kl_on == "all"
        if every:
            means = self._mean(F.linear(x, self.W_enc, self.b_enc))
        log_variance = torch.zeros((), dtype=means.dtype, device=means.device)
        if self.config.variance == "learned":
            if every:
                log_variance = F.linear(x, self.W_var, self.b_var)
            else:
                with torch.no_grad():
                    scores = F.linear(x, self.W_var, self.b_var)
                log_variance = sparse_encode(x, self.W_var, self.b_var, scores, pattern)
        return gaussian_kl(means / self.std, self._clamped(log_variance)).sum()

    def _mean(self, u: Tensor) -> Tensor:
        return F.relu(u) if self.config.relu_mean else u

    def _clamped(self, log_variance: Tensor) -> Tensor:
        bounds = self.config.log_variance_range
        return log_variance if bounds is None else log_variance.clamp(*bounds)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.std.div_(scale if out_scale is None else out_scale)
        if self.config.variance == "learned":
            self.W_var.mul_(scale)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``KL(N(mean, exp(log_variance)) || N(0, 1))``, elementwise."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2
