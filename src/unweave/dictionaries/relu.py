"""ReLU with an L1 penalty: the plain sparse autoencoder, in its two standard recipes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch, warm
from unweave.dictionaries._closed_form import Backward, Step
from unweave.dictionaries._linear import LinearConfig, LinearDictionary, fold_decoder_norms
from unweave.dictionaries.registry import register
from unweave.kernels.gradients.reference import Extra, sum_by_feature
from unweave.kernels.select import AboveRule, Rule


class ReLUConfig(LinearConfig):
    """
    Attributes:
        variant: "april" leaves the decoder norms free and weighs the penalty with them (Anthropic, April 2024);
            "standard" keeps unit-norm atoms and subtracts the decoder bias (Bricken et al. 2023).
        subtract_bias: when not given, False for april; for standard True where d_in is d_out.
        l1_coefficient: for inputs scaled to E||x||^2 = 1. None: 5 / sqrt(d_in) for april (5 at E||x|| = sqrt(d)),
            0.04 for standard.
        l1_warmup: share of training over which the penalty rises from 0.
    """

    variant: Literal["april", "standard"] = "april"
    subtract_bias: bool = False
    l1_coefficient: PositiveFloat | None = None
    l1_warmup: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _standard_subtracts(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("variant") == "standard" and "subtract_bias" not in values:
            return {**values, "subtract_bias": values.get("d_in") == values.get("d_out")}
        return values


@register("relu")
class ReLU(LinearDictionary):
    """``z = ReLU(u)``, loss ``||x - x_hat||^2 + lambda sum_i z_i ||d_i||``."""

    Config = ReLUConfig
    citation = "Bricken et al. 2023, Towards monosemanticity; Anthropic, circuits updates April 2024"
    good_for = "comparing with published work; shrinks values, and its L0 follows from a coefficient"
    lr_at_16k = 3e-4

    def __init__(self, config: ReLUConfig) -> None:
        super().__init__(config)
        if config.variant == "april":
            with torch.no_grad():
                self.W_dec.mul_(0.1)
                self.W_enc.mul_(0.1)

    @property
    def unit_norm(self) -> bool:
        return self.config.variant == "standard"

    def rule(self) -> Rule:
        return AboveRule(0.0)

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        trained, mse, reconstruction = self.errors(code, batch.target)
        l1 = l1_loss(code, self.W_dec.norm(dim=1))
        total = trained + self._coefficient(batch.progress) * l1
        return Loss(total, {"mse": mse.detach(), "l1": l1.detach()}, code.detach(), reconstruction.detach())

    def _coefficient(self, progress: float) -> float:
        config = self.config
        default = 5 / self.d_in**0.5 if config.variant == "april" else 0.04
        full = default if config.l1_coefficient is None else config.l1_coefficient
        return full * warm(progress, config.l1_warmup)

    def backward(self, step: Step) -> Backward:
        return l1_backward(self, step, self._coefficient(step.batch.progress))

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        fold_decoder_norms(self)


def l1_loss(code: SparseCode, norms: Tensor) -> Tensor:
    """``sum_i z_i ||d_i||`` averaged over rows, from the ``(n_features,)`` norms of the atoms."""
    return (sum_by_feature(code.pattern, code.values) * norms).sum() / max(1, len(code))


def l1_backward(dictionary: LinearDictionary, step: Step, coefficient: float) -> Backward:
    """That penalty, times a coefficient, and its gradients, by the codes and by the atoms."""
    n, norms = max(1, len(step.x)), dictionary.W_dec.detach().norm(dim=1)
    sums = sum_by_feature(step.pattern, step.values)
    l1 = (sums * norms).sum() / n
    grad = step.grads + coefficient / n * norms[step.pattern.indices.long()]
    pull = coefficient / n * sums / norms.clamp_min(1e-12)
    return Backward(grad, coefficient * l1, {"l1": l1}, decoder=Extra(pull=pull))
