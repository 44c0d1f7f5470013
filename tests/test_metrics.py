"""Closed forms: each measure on cases whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unweave import metrics
from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.metrics import FiringSums, Groups, ReconstructionSums


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) + 3.0


def test_identity(rows):
    assert metrics.fvu(rows, rows) == 0.0
    assert metrics.cosine(rows, rows) == 1.0
    assert metrics.l2_ratio(rows, rows) == 1.0
    assert metrics.relative_bias(rows, rows) == 1.0


def test_mean_predictor_has_fvu_exactly_one(rows):
    """A known bug elsewhere makes this 0.111 (explained variance 0.889): the mean must explain nothing."""
    mean = rows.double().mean(0).expand_as(rows)
    assert metrics.fvu(rows, mean) == pytest.approx(1.0, abs=1e-14)
    far = rows + 1000.0
    assert metrics.fvu(far, far.double().mean(0).expand_as(far)) == pytest.approx(1.0, abs=1e-12)


def test_zero_and_half(rows):
    centred = rows - rows.mean(0)
    assert metrics.fvu(centred, torch.zeros_like(rows)) == pytest.approx(1.0, abs=1e-9)
    assert metrics.fvu(rows, torch.zeros_like(rows)) > 1.0
    assert metrics.cosine(rows, torch.zeros_like(rows)) == 0.0
    assert math.isnan(metrics.relative_bias(rows, torch.zeros_like(rows)))
    assert metrics.l2_ratio(rows, rows / 2) == pytest.approx(0.5, abs=1e-12)
    assert metrics.relative_bias(rows, rows / 2) == pytest.approx(0.5, abs=1e-12)
    assert metrics.fvu(centred, centred / 2) == pytest.approx(0.25, abs=1e-6)
    assert metrics.cosine(rows, -rows) == -1.0


def test_fvu_against_numpy(rows):
    noisy = rows + 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    x, y = rows.double().numpy(), noisy.double().numpy()
    expected = ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert metrics.fvu(rows, noisy) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_rows_that_do_not_vary_have_no_fvu(value):
    assert math.isnan(metrics.fvu(torch.full((20, 3), value), torch.ones(20, 3)))


def test_no_rows():
    assert math.isnan(ReconstructionSums(3).values()["fvu"])
    sums = ReconstructionSums(3)
    sums.add(torch.zeros(0, 3), torch.zeros(0, 3))
    assert math.isnan(sums.values()["cosine"])
    assert math.isnan(metrics.l0(SparseCode.empty(0, 4)))


def test_zero_rows_in_cosine_and_ratio():
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert metrics.cosine(x, y) == pytest.approx(1 / 3)  # 1, 0, 0
    assert metrics.l2_ratio(x, y) == 2.0  # only the last row has a length


def test_streaming_equals_one_piece(rows):
    noisy = rows * 0.9 + 0.1
    groups = Groups(8)
    sums = ReconstructionSums(12, groups)
    for i in range(0, 500, 70):
        part = slice(i, i + 70)
        sums.add(rows[part], noisy[part], torch.arange(500)[part] // 10)
    assert groups.n_documents == 50
    assert sums.counts().sum() == 500
    assert np.count_nonzero(sums.counts()) == 8
    for name, value in sums.values().items():
        assert value == pytest.approx(getattr(metrics, name)(rows, noisy), rel=1e-10), name


def test_weights_stand_for_repeated_documents(rows):
    """Weighting a group twice equals adding its rows twice: this is what makes the bootstrap right."""
    noisy = rows + 0.5 * rows.roll(1, 0)
    document = torch.arange(500) // 100
    sums = ReconstructionSums(12, Groups(5))
    sums.add(rows, noisy, document)
    weights = np.array([[2.0, 0.0, 1.0, 1.0, 0.0]])
    again = torch.cat([rows[document == g].repeat(int(w), 1) for g, w in enumerate(weights[0])])
    again_noisy = torch.cat([noisy[document == g].repeat(int(w), 1) for g, w in enumerate(weights[0])])
    for name, value in sums.statistics(weights).items():
        assert value[0] == pytest.approx(getattr(metrics, name)(again, again_noisy), rel=1e-10), name


def test_half_precision_input_is_summed_in_float64():
    x = (torch.randn(4096, 8, generator=torch.Generator().manual_seed(2)) + 100).bfloat16()
    y = x.float() + 0.25
    exact = metrics.fvu(x.double(), y.double())
    assert metrics.fvu(x, y) == exact


def test_wrong_shapes():
    sums = ReconstructionSums(4)
    with pytest.raises(UnweaveError, match=r"equal shape \(n, 4\).*\(2, 3\)"):
        sums.add(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(UnweaveError, match="equal shape"):
        sums.add(torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(UnweaveError, match="one document number per row"):
        ReconstructionSums(4, Groups(2)).add(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(UnweaveError, match="5 features, found 4"):
        FiringSums(5).add(SparseCode.empty(1, 4))


@pytest.fixture
def code() -> SparseCode:
    """Twenty rows. Feature 0 fires always, 1 in two rows (exactly a tenth), 2 in three rows, negatively; 3 holds
    explicit zeros only; 4 has no entry."""
    dense = torch.zeros(20, 5)
    dense[:, 0] = 1.0
    dense[:2, 1] = 0.5
    dense[:3, 2] = -2.0
    rows = [[i for i in range(5) if dense[r, i] != 0] + [3] for r in range(20)]
    offsets = torch.tensor([0] + [len(r) for r in rows]).cumsum(0)
    indices = torch.tensor([i for r in rows for i in r])
    values = torch.tensor([float(dense[n, i]) for n, r in enumerate(rows) for i in r])
    return SparseCode(indices, values, offsets, 5)


def test_firing_by_hand(code):
    assert metrics.l0(code) == pytest.approx(25 / 20)
    density = metrics.density(code)
    assert density.tolist() == [1.0, 0.1, 0.15, 0.0, 0.0]
    assert metrics.dead_share(density) == pytest.approx(0.4)  # an explicit zero is not alive, a negative value is
    assert metrics.dense_share(density) == pytest.approx(0.4)  # exactly a tenth is not dense


def test_firing_sums_equal_the_pure_functions(code):
    sums = FiringSums(5, Groups(4))
    for i in range(0, 20, 6):
        sums.add(code[i : i + 6], torch.arange(20)[i : i + 6] // 3)
    density = metrics.density(code)
    assert torch.equal(sums.density, density)
    assert sums.values() == {
        "l0": pytest.approx(metrics.l0(code)),
        "dead_share": pytest.approx(metrics.dead_share(density)),
        "dense_share": pytest.approx(metrics.dense_share(density)),
    }


def test_groups_number_documents_in_order_of_appearance():
    groups = Groups(3)
    assert groups(torch.tensor([9, 9, 4, 7])).tolist() == [0, 0, 1, 2]
    assert groups(torch.tensor([100, 4, 9])).tolist() == [0, 1, 0]  # the fourth document folds onto the first group
    assert groups.n_documents == 4


def test_every_measure_has_a_version():
    sums = {**ReconstructionSums(2).values(), "l0": 0, "dead_share": 0, "dense_share": 0, "density": 0}
    assert set(sums) == set(metrics.VERSIONS)
