"""Each baseline on data it is made for."""

from __future__ import annotations

import pytest
import torch

from unweave import metrics
from unweave.evaluation.baselines import PCA, Neurons, RandomDictionary


def test_pca_is_exact_on_data_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    basis, mean = torch.randn(4, 20, generator=generator), torch.randn(20, generator=generator) * 10
    fit = torch.randn(300, 4, generator=generator) @ basis + mean
    fresh = torch.randn(100, 4, generator=generator) @ basis + mean
    assert metrics.fvu(fresh, PCA(fit, l0=4)(fresh)) < 1e-9
    assert metrics.fvu(fresh, PCA(fit, l0=3)(fresh)) > 0.01
    assert metrics.fvu(fresh, PCA(fit, l0=50)(fresh)) < 1e-9  # no more components than dimensions


def test_pca_is_the_best_linear_subspace():
    rows = torch.randn(2000, 10, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 11)
    expected = 1 - sum(i**2 for i in (8, 9, 10)) / sum(i**2 for i in range(1, 11))
    assert metrics.fvu(rows, PCA(rows, l0=3)(rows)) == pytest.approx(expected, abs=0.03)


def test_neurons_are_exact_on_axis_sparse_data():
    generator = torch.Generator().manual_seed(2)
    rows = torch.zeros(500, 30)
    at = torch.rand(500, 30, generator=generator).topk(3, dim=1).indices
    rows.scatter_(1, at, torch.randn(500, 3, generator=generator).sign() * 2 + 10)
    kept = Neurons(torch.zeros(5, 30), l0=3)(rows)  # mean 0, as most coordinates are
    assert torch.equal(kept, rows)
    assert metrics.fvu(rows, Neurons(torch.zeros(5, 30), l0=2)(rows)) > 0.1


def test_neurons_fill_with_the_mean():
    mean = torch.tensor([10.0, -5.0, 1.0])
    out = Neurons(mean.expand(4, 3), l0=1)(torch.tensor([[10.5, -9.0, 1.0]]))
    assert out.tolist() == [[10.0, -9.0, 1.0]]


def test_random_dictionary_by_hand():
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(3)) + 2
    rival = RandomDictionary(rows, l0=2, n_features=16, seed=5)
    assert torch.allclose(rival.directions.norm(dim=1), torch.ones(16), atol=1e-6)
    x = rows[:1].double() - rival.mean
    directions = rival.directions.double()
    scores = (directions @ x[0]).abs().argsort(descending=True)[:2]
    plain = sum((directions[i] @ x[0]) * directions[i] for i in scores)
    assert torch.allclose(rival(rows[:1].double())[0], rival.mean + rival.scale * plain, atol=1e-6)


def test_random_dictionary_scale_is_the_least_squares_optimum():
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(4))
    rival = RandomDictionary(rows, l0=6, n_features=64)

    def error(scale: float) -> float:
        rival.scale = scale
        return float((rows - rival(rows)).square().sum())

    best = rival.scale
    assert error(best) < min(error(best * 1.02), error(best * 0.98))
    assert best < 0.9  # six overlapping directions overshoot when simply summed
    assert metrics.fvu(rows, RandomDictionary(rows, l0=6, n_features=64)(rows)) < 1


def test_seeds():
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(5))
    first, again, other = (RandomDictionary(rows, l0=2, n_features=16, seed=s)(rows) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
