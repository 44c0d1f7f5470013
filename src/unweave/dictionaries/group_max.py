"""GroupMax: features in k groups, and in every row the strongest of each group."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.kernels.pattern import Pattern


class GroupMaxConfig(TopKConfig):
    """
    Attributes:
        k: groups, of neighbouring features, and so the most features that a row has.
    """


@register("group_max")
class GroupMax(TopK):
    """``z = ReLU(u)`` at the largest u of each of k groups of neighbouring features, else 0; otherwise as TopK.

    The cheapest selection there is, one pass without sorting; two features of one group never fire together. Group g
    of m features ends before feature ``ceil(g m / k)``, so that groups differ by at most one where k does not divide m
    (sparsify, where the rule comes from, allows no such k).
    """

    Config = GroupMaxConfig
    citation = "EleutherAI 2025, sparsify (activation `groupmax`), github.com/EleutherAI/sparsify"
    good_for = "the cheapest selection: one winner in each of k groups"
    ordered_features = True

    def __init__(self, config: GroupMaxConfig) -> None:
        super().__init__(config)
        ends = (torch.arange(config.k + 1) * config.n_features + config.k - 1) // config.k
        width = int(ends.diff().max())
        # A group that is one short names its last feature twice, which changes no maximum.
        self._members = torch.minimum(ends[:-1, None] + torch.arange(width), ends[1:, None] - 1)

    def select(self, scores: Tensor) -> Pattern:
        n, (k, width) = len(scores), self._members.shape
        members = self._members.to(scores.device)
        even = k * width == self.n_features
        grouped = scores.view(n, k, width) if even else scores[:, members]
        best = grouped.argmax(2)
        indices = members.expand(n, k, width).gather(2, best[:, :, None])
        return Pattern(torch.arange(n + 1, device=scores.device) * k, indices.reshape(-1).int(), self.n_features)
