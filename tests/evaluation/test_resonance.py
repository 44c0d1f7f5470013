"""Planted features: the model, its conditions, and the firing frequencies at which features are found."""

from __future__ import annotations

import pytest
import torch

from unweave.errors import UnweaveError
from unweave.evaluation.resonance import PlantedFeatures, identifiability, recovered, resonance_curve


def test_rows_are_sparse_sums_of_the_directions():
    planted = PlantedFeatures.gaussian(40, 16, 3, seed=1)
    x, codes = planted.sample(5000, seed=2)
    assert torch.equal(x, codes @ planted.directions)
    assert (codes != 0).sum(1).unique().tolist() == [3]
    assert 0.5 <= float(codes[codes > 0].min()) < float(codes.max()) < 1.5
    share = (codes != 0).double().mean(0)
    assert float((share - planted.frequency).abs().max()) < 5 * (0.075 / 5000) ** 0.5
    assert torch.equal(planted.sample(10, seed=3)[0], planted.sample(10, seed=3)[0])
    weights = torch.ones(40)
    weights[0] = 10
    _, codes = PlantedFeatures(planted.directions, 3, weights).sample(5000)
    assert float((codes[:, 0] != 0).double().mean()) > 0.4


def test_identifiability_measures_what_it_says():
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    codes = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    found = identifiability(codes, directions)
    assert (found.most_active, found.n_rows, found.rarest) == (2, 5, 1)
    assert found.most_cooccurring == 1.0  # the second never comes without the first
    assert found.coherence == pytest.approx(0.8)
    assert len(found.violations()) == 3
    assert "too dense: up to 2" in found.violations(most_active=1)[0]
    planted = PlantedFeatures.gaussian(64, 128, 3)
    assert identifiability(planted.sample(5000)[1], planted.directions).violations(most_active=3) == []


def test_recovered_counts_true_directions():
    truth = torch.eye(4)
    atoms = torch.stack([truth[0] * 3, truth[1] + 0.3 * truth[2], -truth[3]])
    assert recovered(atoms, truth) == 0.5
    assert recovered(atoms, truth, 0.99) == 0.25


# 64 features in 32 dimensions, 3 a row; 256 neurons, 4,000 rows, share of features found at a cosine of 0.9. Over 5
# seeds: p/f 0.05: 0.03 to 0.06, 0.25: 0.69 to 0.84, 0.5: 0.81 to 0.91, 1: 0.69 to 0.78, 2: 0.22 to 0.45, 4: up to
# 0.06, 10: 0. So neurons resonate at about half of the frequency of a feature. With 256 features in 64 dimensions,
# 2,048 neurons and 20,000 rows (seed 0): 0.05: 0.47, 0.25 to 1: 1, 4: 0.65, 10 and 30: 0.
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_neurons_find_features_that_fire_about_as_often_as_they_do(seed: int):
    planted = PlantedFeatures.gaussian(64, 32, 3, seed)
    ratios = (0.05, 0.25, 0.5, 2, 4, 10)
    curve = resonance_curve(planted, ratios, n_neurons=256, n_rows=4000, seed=seed)
    found, settled = [p.recovered for p in curve], [p.settled for p in curve]
    assert [p.ratio for p in curve] == list(ratios)
    assert found[0] < found[1] < found[2] > found[3] > found[4] >= found[5] == 0
    assert found[2] > 0.7
    assert settled[2] > 0.7 > settled[3] > settled[5] == 0


@pytest.mark.slow
def test_the_band_is_narrow_where_dimensions_are_few():
    """The theory's other half: below d = sqrt(n) next to nothing is found (8 dimensions: at most 0.23 on 256)."""
    few, many = (
        max(
            p.recovered
            for p in resonance_curve(PlantedFeatures.gaussian(256, d, 3), (0.25, 0.5, 1), n_neurons=512, n_rows=8000)
        )
        for d in (8, 64)
    )
    assert few < 0.4 < 0.8 < many


def test_what_cannot_be_is_refused():
    with pytest.raises(UnweaveError, match=r"expected n_active from 1 to n = 8, found 9"):
        PlantedFeatures.gaussian(8, 4, 9)
    with pytest.raises(UnweaveError, match=r"a ratio of 100 means firing in 37500 of 1000 rows"):
        resonance_curve(PlantedFeatures.gaussian(8, 4, 3), (100,), n_neurons=4, n_rows=1000)
    with pytest.raises(UnweaveError, match=r"found \(3, 4\) and \(5, 2\)"):
        identifiability(torch.zeros(3, 4), torch.zeros(5, 2))
