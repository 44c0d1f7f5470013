"""Matryoshka: nested prefixes of the features each reconstruct the target, so that the first ones learn the general."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import DictionaryConfig
from unweave.dictionaries._closed_form import Fit, nested_fit
from unweave.dictionaries._linear import Errors, LinearDictionary
from unweave.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from unweave.dictionaries.jumprelu import JumpReLU, JumpReLUConfig
from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.kernels.autograd import sparse_decode
from unweave.kernels.pattern import Pattern
from unweave.kernels.prefixes.reference import group_of
from unweave.kernels.workspace import Workspace


class NestedConfig(DictionaryConfig):
    """
    Attributes:
        group_fractions: how the features are divided: shares of n_features, in order, that add up to 1. Prefix i is
            the first i groups.
        group_weights: of each prefix's squared error in the loss, brought to a sum of 1; equal when None.
        prefixes: "fixed" takes those; "random" draws others for every batch, of equal weight: the whole dictionary
            and ``n_prefixes - 1`` lengths below it, no two equal (Nabeshima 2024).
        n_prefixes: of the random ones, the whole included.
        pareto: exponent a of their lengths: a length of at most l has probability ``1 - (l + 1)^-a``, cut off at
            n_features.
    """

    group_fractions: tuple[float, ...] = Field((1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32), min_length=1)
    group_weights: tuple[float, ...] | None = None
    prefixes: Literal["fixed", "random"] = "fixed"
    n_prefixes: PositiveInt = 10
    pareto: PositiveFloat = 0.5

    @model_validator(mode="after")
    def _groups_fit(self) -> NestedConfig:
        fractions, weights = self.group_fractions, self.group_weights
        if self.prefixes == "random":
            if weights is not None:
                raise ValueError("group_weights belong to fixed prefixes: random ones all have the same weight")
            return self
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"group_fractions must be positive and add up to 1, found a sum of {sum(fractions):g}")
        if len(set(self.prefix_ends())) < len(fractions) or self.prefix_ends()[0] < 1:
            raise ValueError(
                f"group_fractions: {len(fractions)} groups are too many for {self.n_features} features, one is empty"
            )
        if weights is not None and (len(weights) != len(fractions) or min(weights) < 0 or weights[-1] <= 0):
            raise ValueError(f"group_weights must be {len(fractions)} numbers of 0 or more, the last one above 0")
        return self

    def prefix_ends(self) -> list[int]:
        """How many features each fixed prefix has; the last one all of them."""
        ends = torch.tensor(self.group_fractions, dtype=torch.float64).cumsum(0) * self.n_features
        return [*ends.round().long().tolist()[:-1], self.n_features]


class Nested(LinearDictionary):
    """In front of an architecture: its squared error becomes ``sum_g w_g ||x - (z[:m_g] W_dec[:m_g] + b_dec)||^2``."""

    ordered_features = True

    def __init__(self, config: NestedConfig) -> None:
        super().__init__(config)  # pyright: ignore[reportArgumentType]
        weights = torch.tensor(config.group_weights or [1.0] * len(config.group_fractions), dtype=torch.float64)
        self._ends, self._weights = torch.tensor(config.prefix_ends()), weights / weights.sum()

    def errors(self, code: SparseCode, target: Tensor) -> Errors:
        pattern, (ends, weights) = code.pattern, self._prefixes()
        group, sums, total = group_of(pattern, ends), self.b_dec - target, torch.zeros_like(self.b_dec[0])
        mse = total
        for number, weight in enumerate(weights):
            sums = sums + sparse_decode(code.values * (group == number), self.W_dec, pattern)
            mse = sums.square().sum(1).mean()
            total = total + weight * mse
        return Errors(total, mse, target + sums)

    def fit(self, pattern: Pattern, values: Tensor, target: Tensor, work: Workspace) -> Fit:
        return nested_fit(pattern, values, self.W_dec.detach(), self.b_dec.detach(), target, work, *self._prefixes())

    def _prefixes(self) -> tuple[Tensor, Tensor]:
        """``(g,)`` ends and weights."""
        if self.config.prefixes == "fixed":
            return self._ends.to(self.device), self._weights.to(self.b_dec)
        ends = random_ends(self.n_features, self.config.n_prefixes, self.config.pareto)
        return ends.to(self.device), torch.full((len(ends),), 1 / len(ends)).to(self.b_dec)


def random_ends(n_features: int, n_prefixes: int, exponent: float) -> Tensor:
    """``(n_prefixes,)`` rising lengths, the last one ``n_features``; fewer where there are not so many lengths."""
    beyond = torch.arange(1, n_features + 1, dtype=torch.float64).pow(-exponent)  # P(length >= l), up to a factor
    n = min(n_prefixes, n_features) - 1
    if n == 0:
        return torch.tensor([n_features])
    drawn = torch.multinomial(-beyond.diff(), n) + 1
    return torch.cat([drawn.sort().values, torch.tensor([n_features])])


class MatryoshkaConfig(NestedConfig, BatchTopKConfig):
    """The options of BatchTopK and of :class:`NestedConfig`."""


class MatryoshkaTopKConfig(NestedConfig, TopKConfig):
    """The options of TopK and of :class:`NestedConfig`."""


class MatryoshkaJumpReLUConfig(NestedConfig, JumpReLUConfig):
    """The options of JumpReLU and of :class:`NestedConfig`."""


@register("matryoshka")
class Matryoshka(Nested, BatchTopK):
    """BatchTopK with the loss ``sum_g w_g ||x - (z[:m_g] W_dec[:m_g] + b_dec)||^2 + AuxK / 32``.

    Prefix g holds the first m_g features. A general feature that a prefix needs cannot be split up among the special
    ones behind it. Nabeshima's variant also sorts the features by energy while it trains; here they stay where they
    are (our choice), and the order is left to the loss.
    """

    Config = MatryoshkaConfig
    citation = (
        "Bussmann et al. 2025, Learning multi-level features with Matryoshka sparse autoencoders, arXiv:2503.17547; "
        "random prefixes: Nabeshima 2024, Matryoshka sparse autoencoders"
    )
    good_for = "features at several levels of detail; less absorption of general features by special ones"


@register("matryoshka_topk")
class MatryoshkaTopK(Nested, TopK):
    """Matryoshka's nested prefixes over TopK: exactly k features a row, in eval mode as in training."""

    Config = MatryoshkaTopKConfig
    citation = Matryoshka.citation
    good_for = "nested levels with a fixed budget a row"


@register("matryoshka_jumprelu")
class MatryoshkaJumpReLU(Nested, JumpReLU):
    """Matryoshka's nested prefixes over JumpReLU: learned thresholds, and a penalty on L0 over all features."""

    Config = MatryoshkaJumpReLUConfig
    citation = Matryoshka.citation
    good_for = "nested levels with a learned threshold for every feature"
