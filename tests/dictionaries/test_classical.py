"""The classical methods: each against its own definition, and all behind the one interface."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unweave
from unweave import dictionaries
from unweave.activations import RowStream
from unweave.dictionaries import Dictionary, TrainingBatch, build
from unweave.dictionaries.classical._reservoir import Reservoir
from unweave.dictionaries.classical._solvers import nonnegative_codes, onto_simplex, simplex_codes
from unweave.errors import UnweaveError
from unweave.metrics import fvu
from unweave.sources.arrays import ArraySource
from unweave.training import TrainingConfig, train

pytest.importorskip("sklearn")

ARCHS = {
    "pca": {"k": 3},
    "ica": {"k": 3},
    "random": {"k": 3},
    "kmeans": {},
    "nmf": {"k": 3},
    "sklearn_dictionary": {"k": 3, "max_iter": 3},
    "archetypal": {"k": 3, "max_iter": 10},
}
SIGNED = ("pca", "ica", "random", "sklearn_dictionary")


def rows(n: int = 600, d: int = 8, seed: int = 0) -> Tensor:
    """Rows with a mean and unequal, heavy-tailed variances."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g).pow(3) * torch.linspace(2, 0.3, d)
    return z @ torch.randn(d, d, generator=torch.Generator().manual_seed(99)) + 1.5


def learnt(arch: str, x: Tensor, n_features: int, batch: int = 200, seed: int = 0, **options) -> Dictionary:
    """One pass over the rows, as training hands them over."""
    torch.manual_seed(seed)
    dictionary = build(arch, x.shape[1], n_features, **options).train()
    for part in x.split(batch):
        dictionary.absorb(TrainingBatch(part, part))
    dictionary.complete()
    dictionary.complete()  # may run more than once
    return dictionary.eval()


# ---- each against its definition ------------------------------------------------------------------------------------


def test_pca_is_the_singular_subspace_and_leaves_the_tail_of_the_spectrum():
    x = rows()
    dictionary = learnt("pca", x, 5)
    centred = (x - x.mean(0)).double().numpy()
    _, lengths, vectors = np.linalg.svd(centred, full_matrices=False)
    ours = dictionary.decoder_directions().double().numpy()
    np.testing.assert_allclose(np.abs((ours * vectors[:5]).sum(1)), 1, atol=1e-6)
    np.testing.assert_allclose(ours.T @ ours, vectors[:5].T @ vectors[:5], atol=1e-5)
    tail = (lengths[5:] ** 2).sum() / (lengths**2).sum()
    assert fvu(x, dictionary(x).detach()) == pytest.approx(tail, rel=1e-4)
    assert fvu(x, learnt("pca", x, 8)(x).detach()) < 1e-9


def test_pca_has_no_more_features_than_dimensions_and_keeps_the_k_largest():
    x = rows()
    code = learnt("pca", x, 20, k=3).encode(x)
    assert code.l0().unique().tolist() == [3]
    assert int(code.indices.max()) < 8
    full = learnt("pca", x, 8).encode(x).dense()
    assert torch.allclose(code.values.abs().reshape(-1, 3).sort(1).values, full.abs().sort(1).values[:, -3:], atol=1e-4)


def test_pca_digits_survive_a_large_mean():
    x = rows(n=4000)
    near, far = (learnt("pca", y, 3).decoder_directions() for y in (x, (x.double() + 4096).float()))
    assert float((near * far).sum(1).abs().min()) > 0.999


def test_kmeans_codes_are_one_hot_and_leave_the_inertia():
    from sklearn.cluster import KMeans

    x = rows()
    dictionary = learnt("kmeans", x, 7)
    code = dictionary.encode(x)
    assert code.offsets.diff().unique().tolist() == [1]
    assert code.values.unique().tolist() == [1.0]
    centroids = (dictionary.decoder_directions() + dictionary.b_dec).detach()
    distances = torch.cdist(x.double(), centroids.double())
    assert torch.equal(code.indices.long(), distances.argmin(1))
    total = (x - x.mean(0)).double().square().sum()
    assert fvu(x, dictionary(x).detach()) == pytest.approx(
        float(distances.min(1).values.square().sum() / total), rel=1e-5
    )
    theirs = KMeans(7, n_init=1, random_state=int(dictionary.seed)).fit(x.numpy())  # rows in another order
    assert fvu(x, dictionary(x).detach()) == pytest.approx(theirs.inertia_ / float(total), rel=0.25)
    same = KMeans(7, init=centroids.numpy(), n_init=1).fit(x.numpy())
    assert fvu(x, dictionary(x).detach()) == pytest.approx(same.inertia_ / float(total), rel=1e-3)


def test_kmeans_with_more_prototypes_than_rows_leaves_some_out():
    x = rows(n=5)
    dictionary = learnt("kmeans", x, 9)
    assert torch.allclose(dictionary(x), x, atol=1e-4)
    assert int((dictionary.encode(rows()).firing_counts() > 0).sum()) <= 5


def test_ica_recovers_independent_sources():
    """Correlation of each source with its feature; over 5 seeds the worst was 0.998."""
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        sources = torch.rand(3000, 4, generator=g).sub(0.5)
        sources[:, 2:] = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(3000, 2, generator=g) * 0.998 + 0.001)
        x = sources @ torch.randn(4, 6, generator=g) + 3
        dictionary = learnt("ica", x, 9, batch=500)
        code = dictionary.encode(x).dense().detach()
        assert int((code.abs().sum(0) > 0).sum()) == 4  # the rows have no more dimensions
        correlation = torch.corrcoef(torch.cat([sources, code[:, :4]], 1).T)[:4, 4:].abs()
        assert float(correlation.max(1).values.min()) > 0.99
        assert fvu(x, dictionary(x).detach()) < 1e-6
        assert torch.allclose(dictionary.decoder_directions()[:4].norm(dim=1), torch.ones(4), atol=1e-5)


def test_nmf_recovers_planted_parts():
    """Cosines of the planted parts with their atoms; over 5 seeds 1.000, and FVU below 2e-8."""
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        parts = torch.rand(5, 20, generator=g) * (torch.rand(5, 20, generator=g) < 0.3)
        parts[:, :5] = torch.eye(5)  # a place of its own for each: then the parts are unique
        x = (torch.rand(1500, 5, generator=g) * (torch.rand(1500, 5, generator=g) < 0.5)) @ parts
        dictionary = learnt("nmf", x, 5, batch=500)
        atoms = dictionary.decoder_directions()
        code = dictionary.encode(x)
        assert float(dictionary.b_dec.detach().abs().max()) == 0  # nothing is shifted where nothing is negative
        assert float(atoms.min()) >= 0
        assert float(code.values.detach().min()) >= 0
        assert float((F.normalize(parts, dim=1) @ atoms.T).max(1).values.min()) > 0.99
        assert fvu(x, dictionary(x).detach()) < 1e-4


def test_nmf_splits_rows_with_negative_entries():
    x = rows()
    dictionary = learnt("nmf", x, 16)
    torch.testing.assert_close(dictionary.b_dec.detach(), x.mean(0), atol=1e-4, rtol=1e-4)
    assert float(dictionary.encode(x).values.detach().min()) > 0
    assert float(dictionary.decoder_directions().min()) < 0
    assert fvu(x, dictionary(x).detach()) < 1e-3  # 16 features for both directions of 8 axes: 1e-13 over 5 seeds


def test_nonnegative_codes_are_those_of_scipy():
    from scipy.optimize import nnls

    g = torch.Generator().manual_seed(0)
    x, atoms = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (20, 9))
    atoms = F.normalize(atoms, dim=1)
    ours = nonnegative_codes(x, atoms, 2000) @ atoms
    for row, found in zip(x.numpy(), ours.numpy()):
        best = nnls(atoms.numpy().T, row)[1]
        assert np.linalg.norm(row - found) == pytest.approx(best, rel=1e-6, abs=1e-8)
    rough = (x - nonnegative_codes(x, atoms, 200) @ atoms).square().sum()
    assert float(rough / (x - ours).square().sum()) < 1 + 1e-3


@pytest.mark.parametrize("m", [9, 30])  # fewer atoms than twice the dimensions, and more
def test_codes_with_k_are_solved_again_on_their_own_support(m):
    from scipy.optimize import nnls

    g = torch.Generator().manual_seed(0)
    x, atoms = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (20, m))
    dense, codes = nonnegative_codes(x, atoms, 2000), nonnegative_codes(x, atoms, 2000, k=3)
    for row, whole, code in zip(x, dense, codes):
        kept = whole.topk(3).indices
        best, error = nnls(atoms[kept].numpy().T, row.numpy())
        np.testing.assert_allclose(code[kept].numpy(), best, atol=1e-6)
        assert set(code.nonzero()[:, 0].tolist()) <= set(kept.tolist())
        assert float((row - code @ atoms).norm()) == pytest.approx(error, rel=1e-6, abs=1e-8)
    shares = simplex_codes(x, atoms, 2000, k=3)
    assert int((shares > 0).sum(1).max()) <= 3
    torch.testing.assert_close(shares.sum(1), torch.ones(20, dtype=torch.float64))


def test_simplex_codes_are_the_nearest_points_of_a_hull():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(30, 5, generator=g, dtype=torch.float64)
    flat = onto_simplex(z)
    torch.testing.assert_close(flat.sum(1), torch.ones(30, dtype=torch.float64))
    for _ in range(200):  # no other point of the simplex is nearer
        other = torch.rand(30, 5, generator=g, dtype=torch.float64).pow(3)
        other = other / other.sum(1, keepdim=True)
        assert ((z - flat).square().sum(1) <= (z - other).square().sum(1) + 1e-12).all()
    triangle = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    points = torch.tensor([[0.2, 0.3], [1.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    nearest = torch.tensor([[0.2, 0.3], [0.5, 0.5], [0.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(simplex_codes(points, triangle, 500) @ triangle, nearest, atol=1e-6, rtol=0)


def test_archetypes_lie_in_the_hull_of_the_data():
    from scipy.optimize import linprog

    x = rows(n=150, d=4)
    dictionary = learnt("archetypal", x, 6)
    archetypes = (dictionary.decoder_directions() + dictionary.b_dec).detach().double()
    for archetype in archetypes:
        # Weights of the data that make it, up to float32: minimise the largest deviation.
        n, d = x.shape
        data = x.double().numpy().T
        deviation = np.vstack([np.hstack([data, -np.ones((d, 1))]), np.hstack([-data, -np.ones((d, 1))])])
        bounds = np.hstack([archetype.numpy(), -archetype.numpy()])
        equal = np.hstack([np.ones(n), 0])[None]
        found = linprog(np.hstack([np.zeros(n), 1]), deviation, bounds, equal, [1], bounds=(0, None))
        assert found.fun < 1e-4 * float(x.abs().max())
    code = dictionary.encode(x)
    torch.testing.assert_close(code.dense().sum(1), torch.ones(150), atol=1e-5, rtol=0)
    assert float(code.values.min()) > 0


def test_archetypal_analysis_finds_the_corners():
    """Rows inside a triangle in 5 dimensions, near its corners now and then. Largest distance of a corner to an
    archetype, of sides of about 3: over 5 seeds 0.005 to 0.053."""
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        corners = torch.randn(3, 5, generator=g)
        shares = torch.distributions.Dirichlet(torch.full((3,), 0.4))
        torch.manual_seed(seed)
        x = shares.sample((800,)) @ corners
        dictionary = learnt("archetypal", x, 3, batch=400)
        archetypes = dictionary.decoder_directions() + dictionary.b_dec.detach()
        assert float(torch.cdist(corners, archetypes).min(1).values.max()) < 0.15
        assert fvu(x, dictionary(x).detach()) < 1e-3


def test_sklearn_dictionary_codes_are_those_of_scikit_learn():
    from sklearn.decomposition import sparse_encode

    x = rows()
    dictionary = learnt("sklearn_dictionary", x, 12, k=3)
    centred = (x - dictionary.b_dec).detach().numpy()
    theirs = sparse_encode(centred, dictionary.decoder_directions().numpy(), algorithm="omp", n_nonzero_coefs=3)
    np.testing.assert_allclose(dictionary.encode(x).dense().numpy(), theirs, atol=2e-3)
    assert fvu(x, dictionary(x).detach()) < 0.7 * fvu(x, learnt("random", x, 12, k=3)(x).detach())


def test_random_directions_are_the_floor():
    """With as many features and k, everything that learns does better.

    FVU over 5 seeds: random 0.34 to 0.58; pca 0.034 to 0.051; ica 0.007 to 0.009; sklearn_dictionary 0.030 to 0.046.
    """
    x = rows()
    floor = learnt("random", x, 8, k=3)
    worst = fvu(x, floor(x).detach())
    assert 0.1 < worst < 0.9
    assert torch.allclose(floor.decoder_directions().norm(dim=1), torch.ones(8), atol=1e-6)
    for arch in ("pca", "ica", "sklearn_dictionary"):
        assert fvu(x, learnt(arch, x, 8, k=3)(x).detach()) < worst / 3, arch


# ---- all behind one interface ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_each_trains_through_fit_is_saved_and_stands_on_its_own(arch: str, tmp_path):
    x = rows(n=512)
    dictionary = unweave.fit(x, arch=arch, n_features=10, n_rows=1024, batch_size=128, **ARCHS[arch])
    assert not any("learning" in name for name in dictionary.state_dict())  # no data rows in what is saved
    code = dictionary.encode(x)
    assert int(code.l0().max()) <= (3 if ARCHS[arch] else 1)
    assert bool((code.values < 0).any()) == (arch in SIGNED)
    assert fvu(x, dictionary(x).detach()) < 1
    dictionary.save(tmp_path)
    loaded = Dictionary.load(tmp_path)
    assert torch.equal(loaded.encode(x).dense(), code.dense())
    assert torch.equal(loaded(x), dictionary(x))
    double = dictionary.double()
    alone = torch.cat([double.encode(row[None]).dense() for row in x[:6].double()])
    torch.testing.assert_close(alone, double.encode(x.double()).dense()[:6])
    assert double.encode(x[:0].double()).shape == (0, 10)


@pytest.mark.parametrize("arch", ARCHS)
def test_folding_the_scale_leaves_outputs_as_they_are(arch: str):
    x = rows()
    dictionary = learnt(arch, x * 0.05, 10, **ARCHS[arch]).double()
    before, code = dictionary(x.double() * 0.05), dictionary.encode(x.double() * 0.05)
    dictionary.fold_scale(0.05)
    torch.testing.assert_close(dictionary(x.double()), before / 0.05)
    unit = 1.0 if arch in ("kmeans", "archetypal") else 1 / 0.05
    torch.testing.assert_close(dictionary.encode(x.double()).dense(), code.dense() * unit)


@pytest.mark.parametrize("arch", ARCHS)
def test_it_depends_on_the_seed_and_the_rows_alone(arch: str):
    x = rows(n=300)
    states = [learnt(arch, y, 10, batch=b, **ARCHS[arch]).state_dict() for y, b in ((x, 200), (x.flip(0), 150))]
    exact = arch != "pca"  # whose sums depend on the order in their last digits
    assert all(
        torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-4) for a, b in zip(*map(dict.values, states))
    )


@pytest.mark.parametrize("arch", ["pca", "kmeans"])
def test_a_killed_run_goes_on_where_it_was(arch: str, tmp_path):
    def run(folder, stop: int | None = None):
        torch.manual_seed(0)
        dictionary = build(arch, 8, 6, **({"k": 3} if arch == "pca" else {}))
        absorb, steps = dictionary.absorb, iter(range(10**9 if stop is None else stop))
        dictionary.absorb = lambda batch: (next(steps), absorb(batch))[1]  # StopIteration is the kill
        config = TrainingConfig(n_rows=1200, batch_size=60, ring_rows=300, checkpoint_every=4, log_every=5)
        return train(dictionary, RowStream(ArraySource(rows()), seed=0), config, folder)

    whole = run(tmp_path / "whole")
    with pytest.raises((StopIteration, RuntimeError)):
        run(tmp_path / "killed", stop=14)
    again = run(tmp_path / "killed")
    state, other = whole.dictionary.state_dict(), again.dictionary.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    strip = [[{k: v for k, v in line.items() if k != "rows_per_s"} for line in t.metrics] for t in (whole, again)]
    assert strip[0] == strip[1]


def test_the_sample_is_uniform_over_distinct_rows_in_whatever_order_they_come():
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    samples = []
    for order in (torch.arange(1000), torch.randperm(1000, generator=torch.Generator().manual_seed(1))):
        reservoir = Reservoir(100, 3, seed=5)
        for part in x[order].split(64):
            reservoir.add(part)
            reservoir.add(part[:10])  # again
        samples.append(reservoir.rows())
    assert torch.equal(*samples)
    assert len(samples[0].unique(dim=0)) == 100
    small = Reservoir(100, 3, seed=5)
    small.add(x[:70].repeat(3, 1))
    assert torch.equal(small.rows().unique(dim=0), x[:70].unique(dim=0))
    counts = torch.zeros(1000)
    for seed in range(300):
        reservoir = Reservoir(100, 3, seed)
        reservoir.add(x)
        counts += (x[:, None] == reservoir.rows()[None]).all(2).any(1)
    assert float(counts.sum()) == 300 * 100
    # Each row is in a tenth of the samples: 30 of 300, standard deviation 5.2.
    assert 4.5 < float(counts.std()) < 5.9
    assert 10 < float(counts.min()) < float(counts.max()) < 52


def test_bad_use_is_refused_in_one_sentence():
    with pytest.raises(UnweaveError, match=r"pca takes its input apart .* found 8 and 3"):
        build("pca", 8, 6, d_out=3)
    with pytest.raises(UnweaveError, match="k must be at most n_features = 6"):
        build("nmf", 8, 6, k=7)
    with pytest.raises(UnweaveError, match="learns without gradients"):
        build("ica", 8, 6).loss(TrainingBatch(rows(), rows()))
    with pytest.raises(UnweaveError, match="leave the target out"):
        build("kmeans", 8, 6).absorb(TrainingBatch(rows(), rows(seed=1)))
    with pytest.raises(UnweaveError, match="takes no k"):
        dictionaries.get("kmeans").sparsity_option(4)


def test_scikit_learn_is_needed_only_by_the_methods_that_use_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for arch in ("pca", "random", "archetypal"):
        learnt(arch, rows(n=50), 3)
    with pytest.raises(UnweaveError, match=r"pip install 'unweave\[sklearn\]'"):
        learnt("nmf", rows(n=50), 3)
