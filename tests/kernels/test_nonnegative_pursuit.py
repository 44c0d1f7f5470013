"""Nonnegative orthogonal matching pursuit: the compiled loop against the one written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.codes import SparseCode
from unweave.kernels.backend import why_not
from unweave.kernels.pursuit import nonnegative

if why_not("cpu") is not None:
    pytest.skip("numba is not installed (pip install numba)", allow_module_level=True)

from unweave.kernels.pursuit import cpu

# (rows, d, atoms, picks): more picks than d, than atoms, one row, primes, and what is large enough for several blocks
SHAPES = [(200, 24, 64, 8), (300, 61, 257, 16), (90, 8, 40, 8), (64, 16, 16, 30), (100, 5, 3, 9), (1, 7, 11, 11)]


def problem(n: int, d: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and atoms that all lean one way, so that values do fall to zero on the way."""
    g = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(m, d, generator=g) + 0.3, dim=1)
    return torch.randn(n, d, generator=g) + 0.5, atoms


def codes(x: Tensor, W: Tensor, k: int, **options: float) -> tuple[SparseCode, SparseCode]:
    ours = SparseCode.from_pattern(*cpu.nonnegative_pursuit(x, W, k, **options))
    exact = options and {"tolerance": float(options["tolerance"])}
    return ours, SparseCode.from_pattern(*nonnegative.nonnegative_pursuit(x.double(), W.double(), k, **exact))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_it_picks_and_weighs_as_the_reference_does(shape: tuple[int, int, int, int], seed: int):
    n, d, m, k = shape
    x, W = problem(n, d, m, seed)
    ours, truth = codes(x, W, k)
    assert torch.equal(ours.offsets, truth.offsets)
    assert torch.equal(ours.indices, truth.indices)  # in order of pick
    torch.testing.assert_close(ours.values, truth.values.float(), rtol=2e-4, atol=2e-5)
    assert float(ours.values.min()) > 0


def test_some_of_these_rows_do_let_go_of_atoms():
    """Or the tests above would not see what happens then: fewer values than picks although the row is not done."""
    x, W = problem(300, 61, 257)
    assert float((codes(x, W, 16)[0].l0() < 16).float().mean()) > 0.1


def test_it_ends_at_a_tolerance():
    x, W = problem(200, 24, 64)
    ours, truth = codes(x, W, 8, tolerance=2.0)
    assert torch.equal(ours.indices, truth.indices)
    assert 0 < float((ours.l0() < codes(x, W, 8)[0].l0()).float().mean()) < 1


def test_of_equal_atoms_one_is_taken_and_rows_of_zeros_have_no_code():
    x, W = problem(40, 12, 30)
    x[::4] = 0
    ours = codes(x, torch.cat([W, W]), 9)[0].dense()
    torch.testing.assert_close(ours[:, :30] + ours[:, 30:], codes(x, W, 9)[0].dense(), rtol=1e-4, atol=1e-5)
    assert int((ours[::4] != 0).sum()) == 0


def test_rows_do_not_depend_on_each_other_or_on_threads(monkeypatch: pytest.MonkeyPatch):
    x, W = problem(300, 61, 257)
    whole = codes(x, W, 16)[0].dense()
    monkeypatch.setattr(cpu, "_ROOM", 257 * 70)
    monkeypatch.setattr(cpu, "_gram_pays", lambda n, m, k: True)
    pieces = torch.cat([SparseCode.from_pattern(*cpu.nonnegative_pursuit(part, W, 16)).dense() for part in x.split(37)])
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
