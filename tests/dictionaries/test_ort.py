"""OrtSAE: the penalty, and that it keeps atoms apart."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tests.dictionaries.toys import planted

import unweave.training
from unweave.dictionaries import TrainingBatch, build
from unweave.dictionaries.ort import nearness
from unweave.metrics import fvu


def test_the_penalty_is_the_mean_squared_cosine_with_the_nearest() -> None:
    atoms = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines = F.cosine_similarity(atoms[:, None], atoms[None], dim=2)
    nearest = [max(float(cosines[i, j]) for j in range(30) if j != i) for i in range(30)]
    truth = torch.tensor(nearest, dtype=torch.float64).square().mean()
    torch.testing.assert_close(nearness(atoms, 30), truth)
    torch.testing.assert_close(nearness(atoms * torch.rand(30, 1).double() * 5, 8192), truth)
    assert float(nearness(atoms[:1], 8192)) == 0  # it has nobody to be near to


def test_chunks_are_dealt_anew_and_see_no_more_than_their_own() -> None:
    atoms = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = float(nearness(atoms, 60))
    torch.manual_seed(0)
    dealt = [float(nearness(atoms, 10)) for _ in range(20)]
    assert len(set(dealt)) == 20
    assert max(dealt) < whole  # the nearest of all is seldom in the same chunk


def test_orthogonal_atoms_are_left_alone() -> None:
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0].requires_grad_()
    penalty = nearness(basis, 16)
    assert float(penalty.detach()) < 1e-28
    assert float(torch.autograd.grad(penalty, basis)[0].abs().max()) < 1e-14


def test_only_every_fifth_step_pays() -> None:
    torch.manual_seed(0)
    dictionary = build("ort", 12, 40, k=3, every=5).train()
    x = torch.randn(32, 12)
    paid = []
    for _ in range(12):
        loss = dictionary.loss(TrainingBatch(x, x))
        paid.append(float(loss.terms["ort"]) > 0)
        dictionary.after_step(loss, 0.5)
    assert [i for i, p in enumerate(paid) if p] == [0, 5, 10]


# Over seeds 0 to 4, the mean cosine with the nearest atom is 0.38 to 0.39, 0.33 to 0.34, 0.27 to 0.28 and 0.20 with
# gamma 0, 0.25, 1 and 4, at FVU 0.058 to 0.062, 0.059 to 0.063, 0.064 to 0.067 and 0.084 to 0.090.
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_atoms_keep_apart_the_more_gamma_asks_for_it(seed: int) -> None:
    _, rows = planted(seed, n=4000)
    gammas = (0.0, 0.25, 1.0, 4.0) if seed else (0.0, 0.25)
    settings = {"n_features": 64, "n_rows": 300 * 256, "batch_size": 256, "k": 3, "seed": seed}
    cosines, errors = [], []
    for gamma in gammas:
        dictionary = unweave.training.fit(rows, "ort", ort_coefficient=gamma, **settings)
        atoms = dictionary.decoder_directions()
        cosines.append(float((atoms @ atoms.T).fill_diagonal_(-1).max(1).values.mean()))
        with torch.no_grad():
            errors.append(fvu(rows, dictionary(rows)))
    assert all(b < a - 0.03 for a, b in pairwise(cosines))
    assert errors[1] < 1.05 * errors[0]  # the default costs next to nothing
