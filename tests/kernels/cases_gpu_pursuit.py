"""Matching pursuit on a GPU against the reference. Run by ``test_gpu.py``, interpreted or on a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F

from unweave.kernels.pursuit import gpu, reference

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SHAPES = [(3, 8, 21, 4), (1, 16, 5, 7), (4, 6, 1100, 3), (0, 4, 9, 2)]  # rows, width, atoms, picks


def problem(n, d, m, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + m)
    x, W = torch.randn(n, d, generator=generator), F.normalize(torch.randn(m, d, generator=generator), dim=1)
    return x.to(DEVICE, dtype), W.to(DEVICE, dtype)


def dense(code):
    pattern, values = code
    return pattern.densify(values)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("tolerance", [None, 1.0])
def test_it_picks_what_the_reference_picks(shape, signed, distinct, tolerance):
    *size, k = shape
    x, W = problem(*size)
    options = {"signed": signed, "distinct": distinct, "tolerance": tolerance}
    truth = reference.matching_pursuit(x.double(), W.double(), k, **options)
    found = gpu.matching_pursuit(x, W, k, **options)
    assert torch.equal(found[0].indices, truth[0].indices)  # in order of first pick
    assert torch.equal(found[0].offsets, truth[0].offsets)
    torch.testing.assert_close(dense(found).double(), dense(truth), rtol=1e-4, atol=1e-5)


def test_an_atom_is_picked_again_and_stays_one_entry():
    W = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.4]]), dim=1).to(DEVICE)
    x = torch.tensor([[1.0, 0.2]]).to(DEVICE)
    found, truth = gpu.matching_pursuit(x, W, 6), reference.matching_pursuit(x, W, 6)
    assert found[0].indices.tolist() == truth[0].indices.tolist()
    torch.testing.assert_close(found[1], truth[1])


@pytest.mark.parametrize("until_repeat", [False, True])
def test_the_trail_is_that_of_the_reference(until_repeat):
    x, W = problem(7, 6, 20)
    trails = [torch.empty(7, 12, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    truth = reference.matching_pursuit(x.double(), W.double(), 12, until_repeat=until_repeat, trail=trails[0])
    found = gpu.matching_pursuit(x, W, 12, until_repeat=until_repeat, trail=trails[1])
    assert torch.equal(trails[0], trails[1])
    assert bool((trails[0] < 0).any()) == until_repeat
    torch.testing.assert_close(dense(found).double(), dense(truth), rtol=1e-4, atol=1e-5)


def test_rows_of_zeros_have_no_entries():
    _, W = problem(1, 8, 21)
    pattern, values = gpu.matching_pursuit(torch.zeros(2, 8, device=DEVICE), W, 3)
    assert pattern.offsets.tolist() == [0, 0, 0]
    assert len(values) == 0
