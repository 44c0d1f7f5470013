"""What a synthetic world is like: one frozen config."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from unweave.config import Config


class Hierarchy(Config):
    """Trees of features: the first ``n_roots`` features are roots, their children follow level by level.

    Attributes:
        n_roots: trees. Features that no tree needs stand alone.
        branching: children of each feature that is not a leaf.
        depth: levels below the roots.
        exclusive: whether of the children of one feature at most one fires in a row.
    """

    n_roots: PositiveInt
    branching: PositiveInt = 4
    depth: PositiveInt = 1
    exclusive: bool = True

    def parents(self, n_features: int) -> list[int]:
        """The parent of each feature, -1 where it has none."""
        parents, level, next_feature = [-1] * n_features, list(range(self.n_roots)), self.n_roots
        for _ in range(self.depth):
            children = list(range(next_feature, next_feature + self.branching * len(level)))
            for place, child in enumerate(children):
                parents[child] = level[place // self.branching]
            level, next_feature = children, next_feature + len(children)
        return parents

    @property
    def size(self) -> int:
        """The features that the trees need."""
        return self.n_roots * sum(self.branching**level for level in range(self.depth + 1))


class SyntheticConfig(Config):
    """Rows that are sums of planted features: ``x = offset + sum of magnitude * direction + noise``.

    The defaults are a small, easy world; :func:`tree_toy` and the docstrings say how the published ones are made.

    Attributes:
        d: width of the rows. n_features: planted features.
        seed: of the world (directions, offset) and, with the number of the stream, of its rows.
        l0: features that fire in a row, in the mean, as far as trees and exclusion leave the rates alone.
        rates: "uniform", or "zipf": feature i fires in proportion to ``(i + 1) ** -zipf_exponent``; or a number for
            each feature, its probability given that its parent fires (``l0`` then says nothing).
        zipf_exponent: of "zipf"; SynthSAEBench has 0.5.
        largest_rate: no feature fires more often; what is cut off goes to the others.
        parents: the parent of each feature (one before it), or -1. A child fires only in rows where its parent does.
        exclusive: sets of features of one parent (or of none), of which at most one fires in a row.
        hierarchy: parents and exclusive children by rule, in place of ``parents``.
        correlation: how firings go together, through a Gaussian copula (a feature fires where its Gaussian is low
            enough, so its rate stays exact): "groups" of ``correlation_size`` consecutive features share a factor;
            "low_rank": every feature loads on ``correlation_size`` factors at random, with either sign. Of features in
            one exclusive set the first one's Gaussian decides.
        correlation_strength: share of each Gaussian's variance that comes from the factors.
        directions: "random" unit vectors, or "orthonormal" ones (``n_features <= d``).
        spread_steps: steps that move random directions apart (least sum of squared cosines).
        cosine: that any two features of ``cosine_among`` have: exactly where directions are otherwise orthonormal,
            roughly where they are random.
        cosine_among: "all", or "siblings" (features of one parent; those without a parent count as siblings).
        magnitude: of a firing feature: "fixed", "uniform", "normal" (raised to a hundredth of the mean where it is
            lower), "exponential" or "lognormal".
        magnitude_mean: its mean.
        magnitude_spread: half the width of "uniform", the standard deviation of "normal" and "lognormal".
        signed: every magnitude gets a random sign.
        children_follow: a child's magnitude is multiplied with its parent's, over the mean.
        noise: root mean square length of the Gaussian noise added to each row.
        offset: length of the fixed vector that is added to each row.
    """

    d: PositiveInt = 32
    n_features: PositiveInt = 64
    seed: NonNegativeInt = 0
    l0: PositiveFloat = 3.0
    rates: Literal["uniform", "zipf"] | tuple[float, ...] = "uniform"
    zipf_exponent: PositiveFloat = 0.5
    largest_rate: float = Field(default=1.0, gt=0, le=1)
    parents: tuple[int, ...] | None = None
    exclusive: tuple[tuple[int, ...], ...] = ()
    hierarchy: Hierarchy | None = None
    correlation: Literal["none", "groups", "low_rank"] = "none"
    correlation_size: PositiveInt = 4
    correlation_strength: float = Field(default=0.5, ge=0, lt=1)
    directions: Literal["random", "orthonormal"] = "random"
    spread_steps: NonNegativeInt = 0
    cosine: float = Field(default=0.0, ge=0, lt=1)
    cosine_among: Literal["all", "siblings"] = "all"
    magnitude: Literal["fixed", "uniform", "normal", "exponential", "lognormal"] = "uniform"
    magnitude_mean: PositiveFloat = 1.0
    magnitude_spread: NonNegativeFloat = 0.5
    signed: bool = False
    children_follow: bool = False
    noise: NonNegativeFloat = 0.0
    offset: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> SyntheticConfig:
        n = self.n_features
        if isinstance(self.rates, tuple):
            if len(self.rates) != n:
                raise ValueError(f"rates: expected one for each of {n} features, found {len(self.rates)}")
            if not all(0 <= rate <= 1 for rate in self.rates):
                raise ValueError("rates must lie between 0 and 1")
        elif self.l0 > n * self.largest_rate:
            raise ValueError(f"l0 must be at most n_features * largest_rate = {n * self.largest_rate:g}")
        if self.directions == "orthonormal" and n > self.d:
            raise ValueError(f"orthonormal directions need n_features <= d = {self.d}")
        if self.directions == "orthonormal" and self.spread_steps:
            raise ValueError("spread_steps has nothing to do for orthonormal directions")
        if self.magnitude == "uniform" and self.magnitude_spread > self.magnitude_mean:
            raise ValueError(
                f"magnitude_spread of uniform magnitudes must be at most their mean, {self.magnitude_mean:g}"
            )
        if self.hierarchy is not None:
            if self.parents is not None or self.exclusive:
                raise ValueError("hierarchy takes the place of parents and exclusive: give one or the other")
            if self.hierarchy.size > n:
                raise ValueError(f"hierarchy: its trees need {self.hierarchy.size} features, there are {n}")
        self._check_structure()
        return self

    def _check_structure(self) -> None:
        parents = self.parent_of()
        if len(parents) != self.n_features:
            raise ValueError(f"parents: expected one for each of {self.n_features} features, found {len(parents)}")
        if wrong := [i for i, parent in enumerate(parents) if not -1 <= parent < i]:
            raise ValueError(f"parents: that of feature {wrong[0]} must come before it or be -1")
        seen: set[int] = set()
        for members in self.exclusive:
            if not all(0 <= member < self.n_features for member in members) or len(set(members)) < max(2, len(members)):
                raise ValueError(f"exclusive: expected two or more different features, found {list(members)}")
            if any(parents[a] != parents[b] for a, b in pairwise(members)):
                raise ValueError(f"exclusive: features {list(members)} must have the same parent")
            if not seen.isdisjoint(members):
                raise ValueError(f"exclusive: a feature of {list(members)} is in another set already")
            seen.update(members)
            if isinstance(self.rates, tuple) and sum(self.rates[i] for i in members) > 1 + 1e-9:
                raise ValueError(f"exclusive: the rates of features {list(members)} add up to more than 1")

    def parent_of(self) -> list[int]:
        """The parent of each feature, -1 where it has none."""
        if self.hierarchy is not None:
            return self.hierarchy.parents(self.n_features)
        return [-1] * self.n_features if self.parents is None else list(self.parents)

    def exclusive_sets(self) -> list[list[int]]:
        """The sets of which at most one feature fires."""
        if self.hierarchy is None:
            return [list(members) for members in self.exclusive]
        if not self.hierarchy.exclusive or self.hierarchy.branching < 2:
            return []
        families: dict[int, list[int]] = {}
        for feature, parent in enumerate(self.parent_of()):
            if parent >= 0:
                families.setdefault(parent, []).append(feature)
        return list(families.values())


def tree_toy(cosine: float = 0.1, seed: int = 0) -> SyntheticConfig:
    """The two-level tree of the matching-pursuit paper (Costa et al. 2025): 20 features in 20 dimensions.

    Eleven exclusive features on top: parents 0, 4 and 8 (0.2 each) and eight without children (0.05 each). Each
    parent has three exclusive children (0.2 each where the parent fires). Siblings have the given cosine; a parent is
    orthogonal to its children. 1.36 features fire in a row.
    """
    rates, parents = [0.2] * 12 + [0.05] * 8, [-1] * 20
    for parent in (0, 4, 8):
        parents[parent + 1 : parent + 4] = [parent] * 3
    tops = tuple(i for i, parent in enumerate(parents) if parent < 0)
    families = tuple(tuple(range(parent + 1, parent + 4)) for parent in (0, 4, 8))
    return SyntheticConfig(
        d=20,
        n_features=20,
        seed=seed,
        rates=tuple(rates),
        parents=tuple(parents),
        exclusive=(tops, *families),
        directions="orthonormal",
        cosine=cosine,
        cosine_among="siblings",
        magnitude="normal",
        magnitude_mean=1.5,
        magnitude_spread=0.25,
    )


def bench_toy(seed: int = 0) -> SyntheticConfig:
    """SynthSAEBench (arXiv:2602.14687) at a 64th of its size: 256 features in 64 dimensions.

    Zipf rates, 16 trees of exclusive children three and nine to a level, firings correlated through eight factors,
    normal magnitudes that follow the parent's, an offset. About 8 features fire in a row. Numbers are ours where the
    paper's depend on the size.
    """
    return SyntheticConfig(
        d=64,
        n_features=256,
        seed=seed,
        l0=10.0,
        rates="zipf",
        zipf_exponent=0.5,
        largest_rate=0.4,
        hierarchy=Hierarchy(n_roots=16, branching=3, depth=2),
        correlation="low_rank",
        correlation_size=8,
        correlation_strength=0.1,
        spread_steps=20,
        magnitude="normal",
        magnitude_mean=4.5,
        magnitude_spread=0.5,
        children_follow=True,
        offset=0.5,
    )
