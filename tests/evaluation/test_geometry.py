"""Measures of atoms beside each other, by their definitions and on cases that can be worked out."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries import build
from unweave.errors import UnweaveError
from unweave.evaluation import geometry
from unweave.evaluation.geometry import (
    babel,
    babel_of_codes,
    coherence,
    effective_rank,
    energy_share,
    epsilon_bound,
    norm_fan,
    zf,
)


def atoms(m: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_babel_is_its_definition(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W = atoms(9, 4)
    G = (W @ W.T).abs()
    truth = max(float(G[j, list(s)].sum()) for s in combinations(range(9), k) for j in range(9) if j not in s)
    assert babel(3 * W, k) == pytest.approx(truth)
    monkeypatch.setattr(geometry, "_ROOM", 1)
    assert babel(W, k) == pytest.approx(truth)


def test_babel_where_it_is_known() -> None:
    assert babel(torch.eye(6), 3) == 0
    assert babel(torch.ones(6, 2), 3) == pytest.approx(3)
    assert coherence(torch.tensor([[1.0, 0], [3, 4]])) == pytest.approx(0.6)
    with pytest.raises(UnweaveError, match="k of 1 or more"):
        babel(torch.eye(3), 0)


def test_babel_of_codes_looks_at_what_fires_together() -> None:
    W = atoms(7, 4)
    dense = torch.zeros(4, 7)
    dense[0, [1, 4, 5]], dense[1, 2], dense[3, [0, 6]] = 1.0, 2.0, -1.0
    G = (W @ W.T).abs()
    three = max(G[a, b] + G[a, c] for a, b, c in ((1, 4, 5), (4, 1, 5), (5, 1, 4)))
    expected = torch.stack([three, G[0, 0] * 0, G[0, 0] * 0, G[0, 6]])
    torch.testing.assert_close(babel_of_codes(W, SparseCode.from_dense(dense)), expected)
    assert float(babel_of_codes(W, SparseCode.from_dense(torch.ones(1, 7)))[0]) == pytest.approx(babel(W, 6))


def test_effective_rank_counts_groups_that_fire_together() -> None:
    alone = SparseCode.from_dense(torch.eye(8).repeat(5, 1))
    assert effective_rank(alone) == pytest.approx(8)
    groups = torch.zeros(40, 12)
    for i in range(40):
        groups[i, 3 * (i % 4) : 3 * (i % 4) + 3] = 1.0 + i
    assert effective_rank(SparseCode.from_dense(groups)) == pytest.approx(4)
    wide = (torch.rand(10, 30, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    values = torch.linalg.svdvals((wide.T @ wide).double())
    shares = values / values.sum()
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    assert effective_rank(SparseCode.from_dense(wide)) == pytest.approx(float(entropy.exp()))
    assert str(effective_rank(SparseCode.empty(3, 4))) == "nan"


def test_energy_share_is_that_of_the_marked_rows() -> None:
    dense = torch.tensor([[2.0, 1, 0, 0], [0, 1, 0, 0], [0, -1, 3, 0]])
    share = energy_share(SparseCode.from_dense(dense), torch.tensor([True, False, False]))
    torch.testing.assert_close(share[:3], torch.tensor([1.0, 0.5, 0.0]).double())
    assert bool(share[3].isnan())
    with pytest.raises(UnweaveError, match="3 of 3 marked"):
        energy_share(SparseCode.from_dense(dense), torch.ones(3, dtype=torch.bool))


# ---- quasi-orthogonality --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("signed", [False, True])
def test_no_row_needs_more_coherence_than_there_is(seed: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = atoms(40, 24, seed)
    f = torch.rand(500, 40, generator=generator, dtype=torch.float64) * (torch.rand(500, 40, generator=generator) < 0.2)
    f[0] = 1
    f = f * (torch.randint(2, f.shape, generator=generator) * 2 - 1) if signed else f
    bound = epsilon_bound((f @ W).norm(dim=1), f.norm(dim=1), 40)
    assert 0.01 * coherence(W) < float(bound.max()) <= coherence(W)


@pytest.mark.parametrize("eps", [0.0, 0.01, 0.3])
def test_equal_codes_on_equally_correlated_atoms_reach_the_bound(eps: float) -> None:
    W = torch.linalg.cholesky(torch.full((12, 12), eps, dtype=torch.float64).fill_diagonal_(1))
    f = torch.full((1, 12), 1.7, dtype=torch.float64)
    norms = (f @ W).norm(dim=1)
    assert float(epsilon_bound(norms, f.norm(dim=1), 12)) == pytest.approx(eps, abs=1e-12)
    low, _ = norm_fan(11 * eps)
    assert float(f.norm() / norms) == pytest.approx(low)


def test_fan_and_odd_rows() -> None:
    assert norm_fan(0.25) == pytest.approx((0.8**0.5, (4 / 3) ** 0.5))
    assert norm_fan(1.0) == (0.5**0.5, float("inf"))
    assert epsilon_bound(torch.tensor([0.0, 2.0]), torch.zeros(2), 5).tolist() == [0.0, float("inf")]
    with pytest.raises(UnweaveError, match="norm_fan"):
        norm_fan(-1)


def test_zf_counts_atom_norms_and_the_bias() -> None:
    torch.manual_seed(0)
    dictionary = build("relu", 8, 30, variant="april").double().eval()
    with torch.no_grad():
        dictionary.b_dec.normal_()
    x = torch.randn(20, 8, dtype=torch.float64)
    lengths = dictionary.encode(x).dense() * dictionary.W_dec.norm(dim=1)
    points = zf(dictionary, x)
    f = (lengths.square().sum(1) + dictionary.b_dec.square().sum()).sqrt().detach()
    torch.testing.assert_close(points.f, f)
    torch.testing.assert_close(points.z, x.norm(dim=1))
    torch.testing.assert_close(points.epsilon, epsilon_bound(x.norm(dim=1), f, 31))
    assert "20 rows" in repr(points)


def test_zf_is_one_for_exact_codes_of_orthonormal_atoms() -> None:
    dictionary = build("topk", 8, 8, k=8).double().eval()
    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    with torch.no_grad():
        dictionary.W_enc.copy_(Q)
        dictionary.W_dec.copy_(Q)
    points = zf(dictionary, torch.rand(30, 8, dtype=torch.float64) @ Q)
    torch.testing.assert_close(points.f, points.z)
    assert points.ratio == pytest.approx(1)
    assert float(points.epsilon.max()) < 1e-12
    with pytest.raises(UnweaveError, match="does not decode linearly"):
        zf(build("poly_topk", 8, 16, k=2), torch.randn(3, 8))
