"""Dictionaries of standardised rows: every row is brought to mean 0 and deviation 1 before, and back afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._linear import LinearConfig, LinearDictionary
from unweave.dictionaries.abs_topk import AbsTopK
from unweave.dictionaries.gated import Gated, GatedConfig
from unweave.dictionaries.jumprelu import JumpReLU, JumpReLUConfig
from unweave.dictionaries.registry import register
from unweave.dictionaries.relu import ReLU, ReLUConfig
from unweave.dictionaries.topk import TopK, TopKConfig


class StandardisedConfig(LinearConfig):
    """
    Attributes:
        standardise: "layer_norm" is ``(x - mean) / (deviation + 1e-5)`` over the row, the deviation unbiased (OpenAI's
            GPT-2 autoencoders); "length" is ``x sqrt(d) / ||x||``.
    """

    standardise: Literal["layer_norm", "length"] = "layer_norm"

    @model_validator(mode="after")
    def _input_is_target(self) -> StandardisedConfig:
        if self.d_in != self.d_out:
            raise ValueError(f"rows are standardised by their own input, so d_out must be d_in = {self.d_in}")
        return self


class Standardised(LinearDictionary):
    """A mixin, first among the bases: the dictionary sees standardised rows only.

    Codes, atoms and ``decode`` are in units of standardised rows, since a code alone does not know its row; the row's
    mean and deviation come back in ``reconstruct(x, code)``, or when the dictionary is called on rows. The loss too is
    of standardised rows, so that long rows count no more than short ones; that is our choice.
    """

    scaled_codes = False  # values are of standardised rows

    epsilon: Tensor

    def __init__(self, config: StandardisedConfig) -> None:
        super().__init__(config)
        self.register_buffer("epsilon", torch.tensor(1e-5))

    def standardise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised rows, and the ``(n, 1)`` means and deviations that bring them back."""
        if self.config.standardise == "length":
            size = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
            return x / size.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(size), size
        mean = x.mean(1, keepdim=True)
        size = ((x - mean).square().sum(1, keepdim=True) / max(1, x.shape[1] - 1)).sqrt()
        return (x - mean) / (size + self.epsilon.to(x)), mean, size

    def centre(self, x: Tensor) -> Tensor:
        return super().centre(self.standardise(x)[0])

    def reconstruct(self, x: Tensor, code: SparseCode) -> Tensor:
        _, mean, size = self.standardise(self.check_input(x))
        return self.decode(code) * size + mean

    def loss(self, batch: TrainingBatch) -> Loss:
        target, mean, size = self.standardise(batch.target)
        loss = super().loss(replace(batch, target=target))
        assert isinstance(loss.reconstruction, Tensor)
        return replace(loss, reconstruction=loss.reconstruction * size + mean)

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, self.standardise(target)[0])

    def initialise_map(self, sample: Tensor, target: Tensor) -> None:
        pass  # its rows are written back with their own mean and deviation, so its atoms live where it reads

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        # What is standardised has no scale: only the epsilon, which is added to a deviation, goes with it.
        self.epsilon.div_(scale)


class StandardisedTopKConfig(StandardisedConfig, TopKConfig):
    """As for topk."""


@register("standardised_topk")
class StandardisedTopK(Standardised, TopK):
    """TopK of rows brought to mean 0 and deviation 1: ``x_hat = dev(x) (z W_dec + b_dec) + mean(x)``."""

    Config: Any = StandardisedTopKConfig
    citation = "Gao et al. 2024, Scaling and evaluating sparse autoencoders, arXiv:2406.04093 (its GPT-2 autoencoders)"
    good_for = "OpenAI's GPT-2 autoencoders and others that standardise every row first"


class StandardisedReLUConfig(StandardisedConfig, ReLUConfig):
    """As for relu."""


@register("standardised_relu")
class StandardisedReLU(Standardised, ReLU):
    """ReLU + L1 on rows brought to mean 0 and deviation 1, as SAELens does with ``layer_norm``.

    Standardised rows have a squared norm of d, so the penalty counts sqrt(d) times as much beside the squared error:
    ``l1_coefficient`` means what it means for ``relu``.
    """

    Config: Any = StandardisedReLUConfig
    citation = ReLU.citation
    good_for = "checkpoints of others that standardise every row first"

    def _coefficient(self, progress: float) -> float:
        return super()._coefficient(progress) * self.d_in**0.5


@register("standardised_abs_topk")
class StandardisedAbsTopK(Standardised, AbsTopK):
    """AbsTopK of rows brought to mean 0 and deviation 1: ``x_hat = dev(x) (z W_dec + b_dec) + mean(x)``."""

    Config: Any = StandardisedTopKConfig
    citation = AbsTopK.citation
    good_for = StandardisedReLU.good_for


class StandardisedJumpReLUConfig(StandardisedConfig, JumpReLUConfig):
    """As for jumprelu."""


@register("standardised_jumprelu")
class StandardisedJumpReLU(Standardised, JumpReLU):
    """JumpReLU of rows brought to mean 0 and deviation 1: ``x_hat = dev(x) (z W_dec + b_dec) + mean(x)``.

    Standardised rows have a squared norm of d, and so squared errors are d times, values and thresholds sqrt(d) times
    as large: penalties and the window are scaled likewise, so that options mean what they mean for ``jumprelu``.
    """

    Config: Any = StandardisedJumpReLUConfig
    citation = JumpReLU.citation
    good_for = StandardisedReLU.good_for

    @property
    def bandwidth(self) -> float:
        return super().bandwidth * self.d_in**0.5

    def _penalty(self, values: Tensor, fires: Tensor, n: int, progress: float) -> Tensor:
        return self.d_in * super()._penalty(values / self.d_in**0.5, fires, n, progress)

    @property
    def _dead_coefficient(self) -> float:
        return super()._dead_coefficient * self.d_in**0.5


class StandardisedGatedConfig(StandardisedConfig, GatedConfig):
    """As for gated."""


@register("standardised_gated")
class StandardisedGated(Standardised, Gated):
    """Gated, of rows brought to mean 0 and deviation 1: ``x_hat = dev(x) (z W_dec + b_dec) + mean(x)``.

    The penalty counts sqrt(d) times as much, as for ``standardised_relu``.
    """

    Config: Any = StandardisedGatedConfig
    citation = Gated.citation
    good_for = StandardisedReLU.good_for

    def coefficient(self, progress: float) -> float:
        return super().coefficient(progress) * self.d_in**0.5
