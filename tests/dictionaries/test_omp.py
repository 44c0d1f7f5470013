"""OMP: values are the best that the picked atoms allow, and the gradient is the whole one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

from unweave.dictionaries import TrainingBatch, build
from unweave.errors import UnweaveError
from unweave.kernels.pursuit.nonnegative import nonnegative_pursuit


def made(k: int = 6, **options):
    torch.manual_seed(0)
    dictionary = build("omp", 16, 60, k=k, **options).double().eval()
    with torch.no_grad():
        dictionary.W_dec.copy_(F.normalize(dictionary.W_dec + 0.15, dim=1))  # coherent atoms: values change signs
    return dictionary


@pytest.fixture
def x() -> Tensor:
    return torch.randn(80, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_residual_is_orthogonal_to_every_atom_with_a_value(nonnegative: bool, x: Tensor) -> None:
    dictionary = made(nonnegative=nonnegative)
    code = dictionary.encode(x)
    left = (x - dictionary(x)).detach() @ dictionary.decoder_directions().T
    assert float(left[code.rows, code.indices.long()].abs().max()) < 1e-10
    assert bool((code.values > 0).all()) == nonnegative
    assert int(code.l0().max()) == 6


def test_values_are_nonnegative_least_squares_on_their_atoms(x: Tensor) -> None:
    dictionary = made()
    atoms = dictionary.decoder_directions().numpy()
    code = dictionary.encode(x)
    for row, one in zip(x.numpy(), code):
        best, _ = nnls(atoms[one.indices].T, row)
        np.testing.assert_allclose(one.values.numpy(), best, rtol=0, atol=1e-10)
    assert int((code.l0() < 6).sum()) > 0  # some atom's value has fallen to zero on the way


def test_with_picks_enough_it_is_nonnegative_least_squares_on_all_atoms(x: Tensor) -> None:
    W = made().decoder_directions()
    pattern, values = nonnegative_pursuit(x, W, 60)
    for row, mine in zip(x.numpy(), pattern.densify(values).numpy()):
        best, norm = nnls(W.numpy().T, row)
        assert np.linalg.norm(row - mine @ W.numpy()) == pytest.approx(norm, abs=1e-8)
        np.testing.assert_allclose(mine, best, rtol=0, atol=1e-7)


def test_more_picks_never_reconstruct_worse_and_end_at_the_tolerance(x: Tensor) -> None:
    W = made().decoder_directions()
    norms = []
    for k in range(1, 9):
        pattern, values = nonnegative_pursuit(x, W, k)
        norms.append((x - pattern.densify(values) @ W).norm(dim=1))
    norms = torch.stack(norms)
    assert bool((norms.diff(dim=0) <= 1e-12).all())
    pattern, values = nonnegative_pursuit(x, W, 8, tolerance=2.0)
    left = (x - pattern.densify(values) @ W).norm(dim=1)
    first = (norms > 2).sum(0).clamp_max(7)
    torch.testing.assert_close(left, norms.gather(0, first[None])[0].where(x.norm(dim=1) > 2, x.norm(dim=1)))


def test_odd_input_is_survived_and_bad_input_refused() -> None:
    W = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    twins = torch.cat([W, W])
    x = torch.tensor([[0.0] * 4, [1.0, 2.0, 3.0, 4.0]])
    pattern, values = nonnegative_pursuit(x, twins, 9)
    assert pattern.offsets[1] == 0
    single, alone = nonnegative_pursuit(x, W, 9)
    torch.testing.assert_close(pattern.densify(values) @ twins, single.densify(alone) @ W)
    assert nonnegative_pursuit(x[:0], W, 3)[0].n_rows == 0
    x[0, 2] = torch.nan
    with pytest.raises(UnweaveError, match="1 of 2 rows of x"):
        nonnegative_pursuit(x, W, 3)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_gradient_is_that_of_the_least_loss(nonnegative: bool, x: Tensor) -> None:
    """The loss with its code solved again for each nudge of the atoms, by finite differences."""
    dictionary = made(k=3, nonnegative=nonnegative)
    loss = dictionary.loss(TrainingBatch(x, x))
    (grad,) = torch.autograd.grad(loss.total, dictionary.W_dec)
    nudge = torch.randn(60, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    around = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            dictionary.W_dec.add_(step * nudge)
            around.append(float(dictionary.loss(TrainingBatch(x, x)).total))
    assert (around[0] - around[1]) / 2e-6 == pytest.approx(float((grad * nudge).sum()), rel=1e-5)


def test_orthonormal_atoms_make_it_matching_pursuit(x: Tensor) -> None:
    atoms = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    codes = []
    for arch in ("omp", "mp"):
        dictionary = build(arch, 16, 16, k=5).double()
        with torch.no_grad():
            dictionary.W_dec.copy_(atoms)
        codes.append(dictionary.encode(x).dense())
    torch.testing.assert_close(*codes)
