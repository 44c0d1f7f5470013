"""k-means: each row is one of a few prototypes."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from unweave.dictionaries.classical._base import LinearClassical, SampledConfig, scikit_learn
from unweave.dictionaries.registry import register
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Rule, TopKRule

_NEVER = -1e30  # the score of a prototype that does not exist


class KMeansConfig(SampledConfig):
    """
    Attributes:
        n_init: starts (k-means++), of which the best is taken.
        max_iter: of each.
    """

    n_init: PositiveInt = 1
    max_iter: PositiveInt = 300


@register("kmeans")
class KMeans(LinearClassical):
    """``z_i = 1`` for the nearest centroid ``c_i``, else 0; ``x_hat = c_i``.

    Atoms are ``c_i - mean`` and the bias is the mean. The nearest is the one with the largest ``(x - mean).(c_i - mean)
    - ||c_i - mean||^2 / 2``, a linear encoder. Codes have no unit; the size is the atoms'.
    """

    Config = KMeansConfig
    citation = "Lloyd 1982, Least squares quantization in PCM; Arthur, Vassilvitskii 2007, k-means++"
    good_for = "one feature a row: how far plain clusters get"
    scaled_codes = False  # memberships

    def rule(self) -> Rule:
        return TopKRule(1)

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        return torch.ones_like(values)

    def learn(self, rows: Tensor) -> None:
        rows = rows.cpu()
        config = self.config
        fitted = scikit_learn("cluster", "KMeans")(
            n_clusters=min(self.n_features, len(rows)),
            n_init=config.n_init,
            max_iter=config.max_iter,
            random_state=int(self.seed),
        ).fit(rows.numpy())
        mean = rows.mean(0)
        atoms = torch.from_numpy(fitted.cluster_centers_).to(mean) - mean
        self.set_atoms(atoms, atoms, mean)
        self.b_enc.fill_(_NEVER)
        self.b_enc[: len(atoms)] = (-atoms.square().sum(1) / 2).to(self.b_enc)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)  # all scores are divided by the scale, so the nearest stays the nearest
        self.W_dec.div_(scale)
