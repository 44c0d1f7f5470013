"""Rough scores in 8 bits: how far off they are, and that what they are off by is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unweave.kernels import int8
from unweave.kernels.backend import Backend, BackendName, backend, why_not
from unweave.kernels.int8 import Int8Product
from unweave.kernels.rows.reference import quantised

BACKENDS: list[BackendName] = ["reference", "cpu"]
SHAPES = [(1, 5), (0, 7), (9, 1), (33, 131), (64, 576)]


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Backend:
    if reason := why_not(request.param):
        pytest.skip(reason)
    return backend(request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scores(product: Int8Product, x: Tensor) -> Tensor:
    rows = product.rows(x)
    return product.scores(rows, lambda dtype: torch.empty(len(x), len(product.W.levels), dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_8_bits(ops, shape):
    """The largest entry of a row is 127, no entry is off by more than half a step, and what was lost is known."""
    A, columns = normal(*shape), normal(shape[1], seed=1).abs() + 0.1
    A[2::5] *= 1e4
    A[1::5] *= 1e-30
    levels, scales, norms, lost = ops.rows.quantised(A, columns)
    true = A.double() * columns
    back = scales.double()[:, None] * levels
    assert levels.dtype == torch.int8
    if len(A):
        assert bool((levels.abs().amax(1) == 127).all())
        assert bool(((back - true).abs() <= 0.5001 * scales.double()[:, None]).all())
    torch.testing.assert_close(norms.double(), true.norm(dim=1), rtol=1e-5, atol=0)
    truly = (back - true).norm(dim=1)
    assert bool(((lost - truly).abs() <= 1e-3 * truly + 1e-6 * norms).all())
    theirs = quantised(A, columns)
    assert int((levels.int() - theirs.levels.int()).abs().max() if len(A) else 0) <= 1  # a half may go either way
    torch.testing.assert_close(scales, theirs.scales)


def test_rows_of_zeros_and_of_next_to_nothing_are_lost_as_a_whole(ops):
    A = torch.zeros(3, 8)
    A[1], A[2] = 1e-38, 1.0
    levels, scales, norms, lost = ops.rows.quantised(A, torch.ones(8))
    assert levels.abs().amax(1).tolist() == [0, 0, 127]
    assert scales.tolist() == [0, 0, pytest.approx(1 / 127)]
    assert bool((lost[:2] <= norms[:2]).all())
    assert float(lost[2]) == pytest.approx(0, abs=1e-6)


def test_whole_sums_become_scores(ops):
    sums = torch.randint(-(2**23), 2**23, (40, 300), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    rows, columns = normal(40).abs(), normal(300, seed=1).abs()
    found = ops.rows.dequantised(sums, rows, columns, torch.empty(40, 300, dtype=torch.bfloat16))
    true = sums.double() * rows.double()[:, None] * columns.double()
    assert bool(((found.double() - true).abs() <= 2.0**-8 * true.abs() + 1e-30).all())


@pytest.mark.parametrize("d", [64, 576])
@pytest.mark.parametrize("seed", range(3))
def test_errors_are_in_proportion_to_the_lengths_given_for_them(ops, d, seed):
    """Whatever the sizes of rows, columns and weights: each score is off by a few d^-0.5 of its row's length at most.

    Largest found over the three seeds, in units of d^-0.5: 3.4 to 4.6.
    """
    x, W = normal(300, d, seed=seed), normal(500, d, seed=seed + 10)
    x[::9] *= 300
    x[:, 3] *= 30
    W[:, 5] *= 20
    product = Int8Product(ops.rows, x, W)
    off = (scores(product, x).double() - x.double() @ W.double().T).abs()
    off -= 2.0**-8 * (x @ W.T).abs()  # bfloat16's, which the screen counts apart
    share = off / product.lengths(product.rows(x)).double()[:, None]
    assert 1.5 < float(share.max()) * d**0.5 < 7
    part = slice(100, 200)
    assert bool((product.lengths(product.rows(x), part) <= product.lengths(product.rows(x))).all())


def test_columns_of_unequal_size_share_their_range_with_the_weights(ops):
    """Rows live in a few large columns, one small column decides: alone it would have one level or two."""
    x, W = normal(400, 64), normal(300, 64, seed=1)
    x[:, :4] *= 100
    W[:, :4] *= 0.01
    exact = x @ W.T
    shared = (scores(Int8Product(ops.rows, x, W), x).float() - exact).norm() / exact.norm()
    plain = quantised(x, torch.ones(64)), quantised(W, torch.ones(64))
    left, right = (a.scales[:, None] * a.levels.float() for a in plain)
    assert float(shared) < 0.5 * float((left @ right.T - exact).norm() / exact.norm())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_spoils_no_other(ops, value):
    x, W = normal(20, 32), normal(50, 32, seed=1)
    x[3, 7] = value
    whole = [b for b in range(20) if b != 3]
    found = scores(Int8Product(ops.rows, x, W), x)[whole].float()
    exact = (x @ W.T)[whole]
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_why_not_is_a_sentence_or_nothing():
    assert int8.why_not() is None or len(str(int8.why_not())) > 20
