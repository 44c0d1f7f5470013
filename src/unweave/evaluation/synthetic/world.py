"""The planted features: their directions, and how they fire."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.codes import SparseCode
from unweave.evaluation.synthetic.config import SyntheticConfig

_SMALLEST = 0.01  # of the mean: a normal magnitude is raised to this, so that a feature that fires is never 0


class World:
    """What a :class:`SyntheticConfig` stands for.

    Attributes:
        directions: ``(n_features, d)`` unit vectors. offset: ``(d,)``.
        parents: ``(n_features,)``, -1 where there is none.
        given: ``(n_features,)`` float64, how often each feature fires among the rows where its parent does.
        rates: ``(n_features,)`` float64, how often it fires in all.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        self.parents = torch.tensor(config.parent_of())
        self.directions = _directions(config, self.parents, generator)
        self.offset = config.offset * F.normalize(torch.randn(config.d, generator=generator), dim=0)
        self._loadings = F.normalize(torch.randn(config.n_features, config.correlation_size, generator=generator))
        self._levels = _levels(self.parents)
        self.given, self.rates = self._rates()
        # Of an exclusive set one number decides, that of its first member: each member has a part of [0, 1).
        self._leader, self._low = torch.arange(config.n_features), torch.zeros(config.n_features, dtype=torch.float64)
        for members in config.exclusive_sets():
            self._leader[members] = members[0]
            self._low[members] = self.given[members].cumsum(0) - self.given[members]

    def _rates(self) -> tuple[Tensor, Tensor]:
        config = self.config
        if isinstance(config.rates, tuple):
            given = torch.tensor(config.rates, dtype=torch.float64)
        else:
            given = wanted = planned_rates(config)
            for level in self._levels[1:]:  # what a rate among all rows is among the rows of the parent
                given = given.index_copy(0, level, (wanted[level] / wanted[self.parents[level]]).clamp_max(1))
            for members in config.exclusive_sets():
                given[members] /= given[members].sum().clamp_min(1)
        rates = given.clone()
        for level in self._levels[1:]:
            rates[level] *= rates[self.parents[level]]
        return given, rates

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, SparseCode]:
        """``n`` rows ``(n, d)`` and their true code."""
        from unweave.kernels.decode.reference import decode

        fires = self._fires(n, generator)
        values = torch.zeros(fires.shape)
        values[fires] = self._magnitudes(int(fires.sum()), generator)
        if self.config.children_follow:
            for level in self._levels[1:]:
                values[:, level] *= values[:, self.parents[level]].abs() / self.config.magnitude_mean
        code = SparseCode.from_dense(values)
        rows = decode(code.pattern, code.values, self.directions) + self.offset
        if self.config.noise:
            rows += torch.randn(rows.shape, generator=generator) * (self.config.noise / self.config.d**0.5)
        return rows, code

    def _fires(self, n: int, generator: torch.Generator) -> Tensor:
        """``(n, n_features)``: feature i where its uniform number lies in its part of [0, 1), and its parent fires."""
        uniform = torch.special.ndtr(self._gaussians(n, generator))[:, self._leader]
        fires = (uniform >= self._low) & (uniform < self._low + self.given)
        for level in self._levels[1:]:
            fires[:, level] &= fires[:, self.parents[level]]
        return fires

    def _gaussians(self, n: int, generator: torch.Generator) -> Tensor:
        """``(n, n_features)`` of variance 1, correlated between features as the config says."""
        config, m = self.config, self.config.n_features
        own = torch.randn(n, m, generator=generator)
        if config.correlation == "none":
            return own
        shared, size = config.correlation_strength, config.correlation_size
        if config.correlation == "groups":
            common = torch.randn(n, math.ceil(m / size), generator=generator)[:, torch.arange(m) // size]
        else:
            common = torch.randn(n, size, generator=generator) @ self._loadings.T
        return shared**0.5 * common + (1 - shared) ** 0.5 * own

    def _magnitudes(self, n: int, generator: torch.Generator) -> Tensor:
        config = self.config
        mean, spread = config.magnitude_mean, config.magnitude_spread
        if config.magnitude == "fixed":
            sizes = torch.full((n,), mean)
        elif config.magnitude == "uniform":
            sizes = mean + spread * (2 * torch.rand(n, generator=generator) - 1)
        elif config.magnitude == "normal":
            sizes = mean + spread * torch.randn(n, generator=generator)
        elif config.magnitude == "exponential":
            sizes = torch.empty(n).exponential_(generator=generator) * mean
        else:
            variance = math.log1p((spread / mean) ** 2)
            sizes = mean * (variance**0.5 * torch.randn(n, generator=generator) - variance / 2).exp()
        if config.magnitude in ("uniform", "normal"):
            sizes = sizes.clamp_min(_SMALLEST * mean)
        if config.signed:
            sizes = torch.where(torch.rand(n, generator=generator) < 0.5, -sizes, sizes)
        return sizes


def planned_rates(config: SyntheticConfig) -> Tensor:
    """``(n_features,)`` float64: rates of the shape asked for that add up to ``l0``, none above ``largest_rate``."""
    n, largest = config.n_features, config.largest_rate
    exponent = config.zipf_exponent if config.rates == "zipf" else 0.0
    shape = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    # The first c rates are cut; the factor of the others follows, for the least c that leaves none too high.
    for cut in range(n):
        rest = (config.l0 - cut * largest) / shape[cut:].sum()
        if rest * shape[cut] <= largest * (1 + 1e-12):
            return torch.cat([torch.full((cut,), largest, dtype=torch.float64), rest * shape[cut:]])
    return torch.full((n,), largest, dtype=torch.float64)


def _levels(parents: Tensor) -> list[Tensor]:
    """Features by their depth in the trees."""
    depth = torch.zeros_like(parents)
    for feature, parent in enumerate(parents.tolist()):  # a parent comes before its children
        if parent >= 0:
            depth[feature] = depth[parent] + 1
    return [(depth == level).nonzero().squeeze(1) for level in range(int(depth.max()) + 1)]


def _directions(config: SyntheticConfig, parents: Tensor, generator: torch.Generator) -> Tensor:
    n, d, c = config.n_features, config.d, config.cosine
    if config.directions == "orthonormal":
        base = torch.linalg.qr(torch.randn(d, n, generator=generator, dtype=torch.float64)).Q.T
    else:
        base = F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
        base = spread_out(base, config.spread_steps)
    if c > 0:
        family = parents if config.cosine_among == "siblings" else torch.full_like(parents, -1)
        for parent in family.unique():
            at = (family == parent).nonzero().squeeze(1)
            # The symmetric square root of the Gram matrix (1 - c) I + c 11^T, times the base.
            own = (1 - c) ** 0.5
            shared = ((1 - c + c * len(at)) ** 0.5 - own) / len(at)
            base[at] = own * base[at] + shared * base[at].sum(0)
    return F.normalize(base, dim=1).float()


def spread_out(vectors: Tensor, n_steps: int) -> Tensor:
    """Unit vectors ``(n, d)`` moved apart: back and forth between tight frames and unit vectors (Tropp et al. 2005).

    The sum of all squared cosines falls towards the least there is, Welch's ``n^2 / d``.
    """
    for _ in range(n_steps):
        left, _, right = torch.linalg.svd(vectors, full_matrices=False)
        vectors = F.normalize(left @ right, dim=1)
    return vectors
