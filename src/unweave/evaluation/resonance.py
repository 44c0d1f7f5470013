"""Planted features: a statistical model of superposition, when it can be undone, and at what firing frequency.

The model is that of Chen et al. 2026 (arXiv:2506.14002): ``X = H V`` with rows of ``H >= 0`` that have s entries each
and Gaussian rows of V. A neuron that fires in a share p of the rows finds a feature that occurs in a share f of them
only where p is near f ("resonance"): see :func:`resonance_curve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.evaluation.geometry import coherence

_BLOCK = 512  # neurons whose scores on all rows are held at a time


@dataclass(frozen=True)
class PlantedFeatures:
    """``x = h V``: every row is a sum of ``n_active`` of the rows of V with values of 0.5 to 1.5.

    Attributes:
        directions: V ``(n, d)``. n_active: s, features in a row.
        weights: ``(n,)``, how much likelier each feature is than another; None where all are alike.
    """

    directions: Tensor
    n_active: int
    weights: Tensor | None = None

    @classmethod
    def gaussian(cls, n: int, d: int, n_active: int, seed: int = 0) -> PlantedFeatures:
        """``n`` random directions of norm 1 in d dimensions, each in a share ``n_active / n`` of the rows."""
        if not 1 <= n_active <= n:
            raise UnweaveError(f"planted features: expected n_active from 1 to n = {n}, found {n_active}")
        generator = torch.Generator().manual_seed(seed)
        return cls(F.normalize(torch.randn(n, d, generator=generator), dim=1), n_active)

    @property
    def frequency(self) -> float:
        """f, the share of rows a feature occurs in, on average."""
        return self.n_active / len(self.directions)

    def sample(self, n_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Rows ``(n_rows, d)`` and their true codes ``(n_rows, n)``."""
        generator = torch.Generator().manual_seed(seed)
        n = len(self.directions)
        keys = torch.rand(n_rows, n, generator=generator).log()  # the largest of log(u) / w: drawn without replacement
        chosen = (keys if self.weights is None else keys / self.weights).topk(self.n_active, dim=1).indices
        values = torch.rand(n_rows, self.n_active, generator=generator) + 0.5
        codes = torch.zeros(n_rows, n).scatter_(1, chosen, values)
        return codes @ self.directions, codes


@dataclass(frozen=True)
class Identifiability:
    """What decides whether features can be told apart from the rows alone.

    Attributes:
        most_active: the largest number of features in a row. n_rows: rows looked at.
        rarest: the smallest number of rows a feature occurs in.
        most_cooccurring: the largest share of a feature's rows in which one other feature occurs too.
        coherence: the largest absolute cosine of two directions.
    """

    most_active: int
    n_rows: int
    rarest: int
    most_cooccurring: float
    coherence: float

    def violations(
        self, *, most_active: int | None = None, rarest: int = 10, cooccurring: float = 0.5, coherence: float = 0.7
    ) -> list[str]:
        """Sentences on what stands in the way; none where all features can be told apart.

        The paper's conditions are row sparsity, features that occur often enough and seldom together relative to
        their own count, and nearly incoherent directions. Its constants are not known to us: the limits here are ours.
        ``most_active``: if given, the number of features a row may have.
        """
        found = []
        if most_active is not None and self.most_active > most_active:
            found.append(f"rows are too dense: up to {self.most_active} features at once, {most_active} allowed")
        if self.rarest < rarest:
            found.append(f"a feature occurs in only {self.rarest} of {self.n_rows:,} rows, fewer than {rarest}")
        if self.most_cooccurring > cooccurring:
            found.append(
                f"a feature comes with the same other one in {self.most_cooccurring:.0%} of its rows, more than "
                f"{cooccurring:.0%}: their sum explains them as well"
            )
        if self.coherence > coherence:
            found.append(f"two directions have a cosine of {self.coherence:.2f}, more than {coherence:.2f}")
        return found


def identifiability(codes: Tensor, directions: Tensor) -> Identifiability:
    """Measure the conditions on true codes ``(n_rows, n)`` and directions ``(n, d)``."""
    if codes.ndim != 2 or directions.ndim != 2 or codes.shape[1] != len(directions):
        raise UnweaveError(
            f"identifiability: expected codes (n_rows, n) and directions (n, d), found {tuple(codes.shape)} and "
            f"{tuple(directions.shape)}"
        )
    fires = (codes != 0).float()
    together = fires.T @ fires
    counts = together.diagonal().clone()
    together.fill_diagonal_(0)
    return Identifiability(
        int(fires.sum(1).max()) if len(codes) else 0,
        len(codes),
        int(counts.min()),
        float((together / counts.clamp_min(1)[:, None]).max()),
        coherence(directions),
    )


def recovered(atoms: Tensor, truth: Tensor, threshold: float = 0.9) -> float:
    """The share of true directions ``(n, d)`` that some atom of ``(m, d)`` has a cosine above ``threshold`` with."""
    best = (F.normalize(truth, dim=1) @ F.normalize(atoms, dim=1).T).max(dim=1).values
    return float((best > threshold).double().mean())


@dataclass(frozen=True)
class Resonance:
    """One point of the curve.

    Attributes:
        ratio: p / f, how often neurons fire relative to how often features occur.
        recovered: share of features that some neuron found. settled: share of neurons that found a feature.
    """

    ratio: float
    recovered: float
    settled: float


def resonance_curve(
    planted: PlantedFeatures,
    ratios: Sequence[float],
    *,
    n_neurons: int = 2048,
    n_rows: int = 20_000,
    n_iterations: int = 15,
    threshold: float = 0.9,
    seed: int = 0,
) -> list[Resonance]:
    """What neurons find when each fires in exactly a share ``p = ratio f`` of the rows.

    Bias adaptation at its fixed point, one neuron at a time: from a random start, ``w <- normalise(sum over rows of
    ReLU(w.x - t) x)`` on centred rows, t the (1 - p) quantile of the neuron's own ``w.x``. The theory predicts a band
    of p around and below f, and nothing far above it.
    """
    x, _ = planted.sample(n_rows, seed + 1)
    x = x - x.mean(0)
    truth, points = F.normalize(planted.directions, dim=1), []
    for ratio in ratios:
        n_fire = round(ratio * planted.frequency * n_rows)
        if not 1 <= n_fire < n_rows:
            raise UnweaveError(
                f"resonance curve: a ratio of {ratio:g} means firing in {n_fire} of {n_rows} rows; expected 1 to "
                f"{n_rows - 1}"
            )
        generator = torch.Generator().manual_seed(seed)
        w = F.normalize(torch.randn(n_neurons, x.shape[1], generator=generator), dim=1)
        for _ in range(n_iterations):
            w = torch.cat([_sharpened(part, x, n_fire) for part in w.split(_BLOCK)])
        best = (w @ truth.T).max(dim=1).values
        points.append(Resonance(ratio, recovered(w, truth, threshold), float((best > threshold).double().mean())))
    return points


def _sharpened(w: Tensor, x: Tensor, n_fire: int) -> Tensor:
    """One iteration, for ``(m, d)`` neurons of which each fires in ``n_fire`` of the rows ``(n, d)``."""
    scores = w @ x.T
    threshold = scores.kthvalue(scores.shape[1] - n_fire, dim=1, keepdim=True).values
    return F.normalize((scores - threshold).relu_() @ x, dim=1)
