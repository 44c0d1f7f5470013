"""Planted features: every number the config asks for is the number the rows have."""

from __future__ import annotations

import itertools

import pytest
import torch

import unweave
from unweave.errors import UnweaveError
from unweave.evaluation.synthetic import Hierarchy, SyntheticConfig, SyntheticSource, bench_toy, tree_toy
from unweave.evaluation.synthetic.world import spread_out
from unweave.sources._base import Source

N = 50_000


def firing(source: SyntheticSource, n: int = N) -> torch.Tensor:
    return source.sample(n).code.dense() != 0


def assert_rates(fires: torch.Tensor, rates: torch.Tensor) -> None:
    """Every empirical rate within 4.5 standard errors (one in 150,000 of honest features is not)."""
    error = (rates * (1 - rates) / len(fires)).sqrt().clamp_min(1e-9)
    assert float(((fires.double().mean(0) - rates) / error).abs().max()) < 4.5


def test_rows_are_the_code_times_the_directions():
    source = SyntheticSource(offset=2.0)
    rows, code = source.sample(500)
    assert float(source.world.offset.norm()) == pytest.approx(2.0)
    torch.testing.assert_close(rows, code.dense() @ source.directions + source.world.offset)
    torch.testing.assert_close(source.directions.norm(dim=1), torch.ones(64))
    noisy = SyntheticSource(offset=2.0, noise=0.3)
    rows, code = noisy.sample(20_000)
    noise = rows - code.dense() @ noisy.directions - noisy.world.offset
    assert float(noise.square().sum(1).mean().sqrt()) == pytest.approx(0.3, rel=0.01)


def test_rows_are_the_same_whoever_asks():
    source = SyntheticSource(n_rows=3000)
    whole = source.sample(3000)
    batches = list(source.batches())
    assert [b.n_rows for b in batches] == [1024, 1024, 952]
    assert torch.equal(torch.cat([b.input for b in batches]), whole.rows)
    part = SyntheticSource().sample(100, first=1000)
    assert torch.equal(part.rows, whole.rows[1000:1100])
    assert torch.equal(part.code.dense(), whole.code.dense()[1000:1100])
    assert torch.equal(next(source.batches(skip=2)).input, batches[2].input)
    assert torch.equal(next(source.batches(skip=2)).meta.document, torch.arange(2048, 3000))
    assert not list(source.batches(skip=3))
    other = source.held_out()
    assert torch.equal(other.directions, source.directions)
    assert not torch.equal(other.sample(10).rows, whole.rows[:10])
    assert not torch.equal(SyntheticSource(seed=1).directions, source.directions)
    assert source.provenance != other.provenance != SyntheticSource(seed=1).provenance
    with pytest.raises(UnweaveError, match="3,000 rows: it cannot give 10 from row 2,995 on"):
        source.sample(10, first=2995)


def test_uniform_rates():
    source = SyntheticSource(l0=3.0)
    assert torch.allclose(source.world.rates, torch.full((64,), 3 / 64).double())
    assert_rates(firing(source), source.world.rates)


def test_zipf_rates_are_cut_at_the_largest():
    source = SyntheticSource(rates="zipf", zipf_exponent=1.0, l0=4.0, largest_rate=0.4)
    rates = source.world.rates
    assert float(rates.sum()) == pytest.approx(4.0)
    assert float(rates.max()) == pytest.approx(0.4)
    tail = rates[(rates < 0.4 - 1e-9).nonzero().squeeze(1)]
    first = 64 - len(tail) + 1
    torch.testing.assert_close(tail[5] / tail[0], torch.tensor(first / (first + 5)).double())
    assert_rates(firing(source), rates)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("magnitude", "mean", "deviation"),
    [
        ("fixed", 2.0, 0.0),
        ("uniform", 2.0, 0.5 / 3**0.5),
        ("normal", 2.0, 0.5),
        ("exponential", 2.0, 2.0),
        ("lognormal", 2.0, 0.5),
    ],
)
def test_magnitudes(magnitude, mean, deviation, signed):
    source = SyntheticSource(magnitude=magnitude, magnitude_mean=2.0, magnitude_spread=0.5, signed=signed)
    values = source.sample(N).code.values
    assert float(values.abs().mean()) == pytest.approx(mean, rel=0.02)
    assert float(values.abs().std()) == pytest.approx(deviation, rel=0.02, abs=1e-6)
    assert float((values < 0).double().mean()) == pytest.approx(0.5 if signed else 0.0, abs=0.01)


def test_groups_fire_together_at_their_rates():
    """A Gaussian copula: rates exact, and pairs of a group co-fire as the bivariate normal says."""
    source = SyntheticSource(n_features=8, l0=4.0, correlation="groups", correlation_size=4, correlation_strength=0.5)
    fires = firing(source)
    assert_rates(fires, source.world.rates)
    both = (fires.double().T @ fires.double()) / N
    inside = [(i, j) for i, j in itertools.combinations(range(8), 2) if i // 4 == j // 4]
    across = [(i, j) for i, j in itertools.combinations(range(8), 2) if i // 4 != j // 4]
    # P(both below the median) = 1/4 + arcsin(rho) / (2 pi) = 1/3 at rho = 1/2.
    assert all(abs(float(both[i, j]) - 1 / 3) < 0.01 for i, j in inside)
    assert all(abs(float(both[i, j]) - 1 / 4) < 0.01 for i, j in across)


def test_low_rank_correlation_has_both_signs_and_keeps_rates():
    source = SyntheticSource(
        n_features=12, l0=6.0, correlation="low_rank", correlation_size=2, correlation_strength=0.9
    )
    fires = firing(source)
    assert_rates(fires, source.world.rates)
    loadings = source.world._loadings.double()
    rho = 0.9 * (loadings @ loadings.T)
    both = (fires.double().T @ fires.double()) / N
    expected = 0.25 + rho.clamp(-1, 1).asin() / (2 * torch.pi)
    off = ~torch.eye(12, dtype=torch.bool)
    assert float((both - expected)[off].abs().max()) < 0.012
    assert float(rho[off].min()) < -0.5 < 0.5 < float(rho[off].max())


def test_trees_by_rule():
    source = SyntheticSource(
        n_features=64, hierarchy=Hierarchy(n_roots=4, branching=3, depth=2), rates="zipf", zipf_exponent=1.0, l0=3.0
    )
    parents = source.world.parents
    assert (parents[:4] == -1).all()
    assert (parents[52:] == -1).all()  # 4 * (1 + 3 + 9) features are in trees
    assert parents[4:16].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert parents[16:19].tolist() == [4] * 3
    fires = firing(source)
    children = (parents >= 0).nonzero().squeeze(1)
    assert not (fires[:, children] & ~fires[:, parents[children]]).any()
    assert not any((fires[:, parents == parent].sum(1) > 1).any() for parent in range(16))
    assert_rates(fires, source.world.rates)
    # Where the children's rates fit below the parent's, they are the planned ones.
    from unweave.evaluation.synthetic.world import planned_rates

    planned = planned_rates(source.config)
    fitting = [i for i in range(4) if float(planned[parents == i].sum()) <= float(planned[i])]
    assert fitting
    for root in fitting:
        torch.testing.assert_close(source.world.rates[parents == root], planned[parents == root])


def test_children_follow_their_parents():
    config = SyntheticConfig(
        n_features=2, d=2, rates=(1.0, 1.0), parents=(-1, 0), magnitude="uniform", children_follow=True
    )
    values = SyntheticSource(config).sample(20_000).code.dense()
    ratio = values[:, 1] / values[:, 0]
    assert 0.5 <= float(ratio.min()) < float(ratio.max()) <= 1.5
    assert float(torch.corrcoef(torch.stack([ratio, values[:, 0]]))[0, 1]) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("cosine", [0.0, 0.1, 0.4, 0.8])
def test_the_tree_toy_is_the_papers(cosine):
    source = SyntheticSource(tree_toy(cosine))
    gram = source.directions.double() @ source.directions.double().T
    parents = source.world.parents
    same = (parents[:, None] == parents[None]) & ~torch.eye(20, dtype=torch.bool)
    torch.testing.assert_close(gram[same], torch.full((int(same.sum()),), cosine).double(), atol=1e-6, rtol=0)
    for parent in (0, 4, 8):
        assert float(gram[parent, parent + 1 : parent + 4].abs().max()) < 1e-6
    fires = firing(source)
    assert float(source.world.rates.sum()) == pytest.approx(1.36)
    assert (fires[:, parents == -1].sum(1) == 1).all()  # 3 * 0.2 + 8 * 0.05 = 1
    children = (parents >= 0).nonzero().squeeze(1)
    assert not (fires[:, children] & ~fires[:, parents[children]]).any()
    assert_rates(fires, source.world.rates)


def test_random_directions_can_be_moved_apart():
    """The sum of squared cosines falls to Welch's bound, n^2 / d."""
    generator = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(200, 32, generator=generator, dtype=torch.float64), dim=1)

    def potential(vectors: torch.Tensor) -> float:
        return float((vectors @ vectors.T).square().sum())

    bound = 200**2 / 32
    assert potential(start) > 1.1 * bound
    assert bound <= potential(spread_out(start, 50)) < 1.001 * bound
    spread = SyntheticSource(n_features=200, spread_steps=50).directions.double()
    assert potential(spread) < 1.001 * bound


def test_random_directions_take_a_mean_cosine():
    directions = SyntheticSource(d=256, n_features=100, cosine=0.3).directions
    off = (directions @ directions.T)[~torch.eye(100, dtype=torch.bool)]
    assert float(off.mean()) == pytest.approx(0.3, abs=0.03)


def test_fit_takes_it_with_and_without_an_end():
    for source, options in ((SyntheticSource(n_rows=2000), {"epochs": 1}), (SyntheticSource(), {"n_rows": 2000})):
        assert isinstance(source, Source)
        dictionary = unweave.fit(source, "topk", n_features=64, k=3, batch_size=200, **options)
        assert dictionary.encode(source.sample(5).rows).n_features == 64


def test_evaluate_takes_it():
    source = SyntheticSource(d=16, n_features=16, directions="orthonormal")
    dictionary = unweave.fit(source, "topk", n_features=32, k=3, n_rows=2000, batch_size=200)
    found = unweave.evaluate(dictionary, source.held_out(), n_rows=1024, n_bootstrap=20, progress=False)
    assert 0 < found["fvu"] < 1
    assert found.data["source"]["kind"] == "synthetic"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0": 65.0}, "l0 must be at most"),
        ({"rates": (0.5,)}, "expected one for each of 64 features, found 1"),
        ({"n_features": 2, "rates": (0.5, 1.5)}, "between 0 and 1"),
        ({"directions": "orthonormal"}, "n_features <= d = 32"),
        ({"magnitude_spread": 2.0}, "at most their mean"),
        ({"n_features": 2, "l0": 1.0, "parents": (1, -1)}, "that of feature 0 must come before it"),
        ({"exclusive": ((1, 2), (2, 3))}, "in another set already"),
        ({"exclusive": ((1, 1),)}, "two or more different features"),
        ({"n_features": 3, "rates": (0.6, 0.6, 0.1), "exclusive": ((0, 1),)}, "add up to more than 1"),
        ({"n_features": 3, "l0": 1.0, "parents": (-1, 0, -1), "exclusive": ((1, 2),)}, "the same parent"),
        ({"hierarchy": Hierarchy(n_roots=20, branching=4)}, "its trees need 100 features"),
        ({"hierarchy": Hierarchy(n_roots=2), "exclusive": ((1, 2),)}, "takes the place"),
        ({"magnitudes": "fixed"}, "unknown key 'magnitudes'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UnweaveError, match=message):
        SyntheticSource(**options)


def test_the_config_goes_to_json_and_back():
    config = SyntheticConfig(rates="zipf", hierarchy=Hierarchy(n_roots=3), exclusive=())
    assert SyntheticConfig.from_json(config.to_json()) == config
    for toy in (tree_toy(0.1), bench_toy()):
        assert SyntheticConfig.from_json(toy.to_json()) == toy
