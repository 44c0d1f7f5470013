"""MP-SAE: what holds for every pursuit, its gradient, and the tree that linear encoders cannot take apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.dictionaries import trees
from torch import Tensor

import unweave.training
from unweave.dictionaries import TrainingBatch, build
from unweave.dictionaries._pursuit import chain
from unweave.errors import UnweaveError

D, M, K = 16, 60, 7


def made(**options):
    torch.manual_seed(0)
    return build("mp", D, M, **{"k": K, **options}).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---- identities -----------------------------------------------------------------------------------------------------


def test_a_residual_is_orthogonal_to_the_last_atom_and_energy_is_kept(x: Tensor) -> None:
    dictionary = made()
    with torch.no_grad():
        dictionary.W_dec.copy_(F.normalize(dictionary.W_dec, dim=1))
    steps, left = dictionary.steps(x), x
    for t in range(K):
        atoms = dictionary.W_dec.detach()[steps.atoms[:, t].long()]
        assert torch.equal(steps.atoms[:, t].long(), (left @ dictionary.W_dec.detach().T).argmax(1))
        left = left - steps.values[:, t, None] * atoms
        assert float((left * atoms).sum(1).abs().max()) < 1e-12
    torch.testing.assert_close(left, steps.residual, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.square().sum(1), steps.values.square().sum(1) + left.square().sum(1))
    torch.testing.assert_close(x, dictionary(x) + left)
    assert bool((steps.norms.diff(dim=1) <= 1e-12).all())


def test_one_more_pick_changes_one_entry(x: Tensor) -> None:
    dictionary = made()
    steps = dictionary.steps(x)
    codes = [steps.code(t).dense() for t in range(K + 1)]
    for t in range(K):
        torch.testing.assert_close(made(k=t + 1).encode(x).dense(), codes[t + 1])
        assert ((codes[t + 1] != codes[t]).sum(1) == 1).all()
    with torch.no_grad():
        errors = [float((x - dictionary.decode(steps.code(t))).square().sum()) for t in range(K + 1)]
    assert errors == sorted(errors, reverse=True)


def test_one_pick_is_top_1_of_the_tied_encoder(x: Tensor) -> None:
    pursuit, topk = made(k=1), build("topk", D, M, k=1, subtract_bias=False).double()
    with torch.no_grad():
        topk.W_enc.copy_(pursuit.W_dec)
        topk.W_dec.copy_(pursuit.W_dec)
        torch.testing.assert_close(pursuit.encode(x).dense(), topk.encode(x).dense())
        torch.testing.assert_close(pursuit(x), topk(x))


def test_adaptive_ends_at_the_first_repeat_and_at_the_tolerance(x: Tensor) -> None:
    steps = made(variant="adaptive", k=40, tolerance=None).steps(x)
    for picks in steps.atoms.tolist():
        picks = [j for j in picks if j >= 0]
        assert len(set(picks[:-1])) == len(picks[:-1])
        assert len(picks) == 40 or picks[-1] in picks[:-1]
    ended = made(variant="adaptive", k=40, tolerance=1.0).steps(x)
    n = (ended.atoms >= 0).sum(1)
    every = torch.arange(len(x))
    assert bool(((ended.norms[:, -1] <= 1) | (n == (steps.atoms >= 0).sum(1))).all())
    assert bool((ended.norms[every, n - 1] > 1).all())
    assert bool((ended.norms[:, -1] <= 1).any())


# ---- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"variant": "adaptive", "k": 30}, {"subtract_bias": True}])
def test_the_gradient_is_that_of_the_chain_written_out(options: dict, x: Tensor) -> None:
    dictionary = made(**options)
    with torch.no_grad():
        dictionary.W_dec.mul_(torch.linspace(0.9, 1.1, M)[:, None])
        if dictionary.b_dec is not None:
            dictionary.b_dec.normal_(std=0.1)
    parameters = list(dictionary.parameters())
    loss = dictionary.loss(TrainingBatch(x, x))
    ours = torch.autograd.grad(loss.total, parameters)
    residual = x if dictionary.b_dec is None else x - dictionary.b_dec
    for picks in dictionary.steps(x).atoms.long().T:
        atoms = dictionary.W_dec[picks.clamp_min(0)]
        residual = residual - (residual * atoms).sum(1, keepdim=True) * atoms * (picks >= 0)[:, None]
    total = residual.square().sum(1).mean()
    torch.testing.assert_close(loss.total, total)
    for a, b in zip(ours, torch.autograd.grad(total, parameters)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_values_carry_a_gradient_too() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, W = (torch.randn(n, 5, generator=generator, dtype=torch.float64, requires_grad=True) for n in (4, 6))
    trail = torch.tensor([[0, 3, 0], [1, 2, -1], [5, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda a, b: chain(a, b, trail), (0.5 * rows, 0.5 * W))


def test_revival_pulls_dead_atoms_and_nothing_else(x: Tensor) -> None:
    dictionary = made(revival_coefficient=0.01, k=2)
    plain, dead = dictionary.loss(TrainingBatch(x, x)), torch.arange(M) < 20
    loss = dictionary.loss(TrainingBatch(x, x, dead))
    residual = x - plain.reconstruction
    expected = -0.01 * (residual @ dictionary.W_dec[dead].T).mean()
    torch.testing.assert_close(loss.total - plain.total, expected)
    (pull,) = torch.autograd.grad(loss.total - plain.total, dictionary.W_dec)
    assert float(pull[~dead].abs().max()) < 1e-12
    torch.testing.assert_close(pull[dead], (-0.01 / 20 * residual.mean(0)).expand(20, D))
    few = torch.arange(M) < 10
    assert torch.equal(dictionary.loss(TrainingBatch(x, x, few)).total, plain.total)


def test_dropout_leaves_atoms_out_of_training_batches_only(x: Tensor) -> None:
    dictionary = made(atom_dropout=0.5)
    before = dictionary.encode(x)
    dictionary.train()
    torch.manual_seed(3)
    used = [dictionary.loss(TrainingBatch(x, x)).code.firing_counts() > 0 for _ in range(2)]
    assert all(int(u.sum()) <= 40 for u in used)
    assert not torch.equal(*used)
    assert torch.equal(dictionary.eval().encode(x).indices, before.indices)


def test_atoms_keep_unit_norm_where_they_should(x: Tensor) -> None:
    for variant, kept in (("fixed", True), ("adaptive", False)):
        dictionary = made(variant=variant)
        optimiser = torch.optim.Adam(dictionary.parameters(), lr=0.05)
        loss = dictionary.loss(TrainingBatch(x, x))
        loss.total.backward()
        dictionary.before_step()
        along = (dictionary.W_dec.grad * dictionary.W_dec.detach()).sum(1).abs().max()
        optimiser.step()
        dictionary.after_step(loss, 1.0)
        assert (float(along) < 1e-12) == kept
        assert torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(M, dtype=torch.float64), atol=1e-12) == kept


def test_what_a_pursuit_cannot_do_is_refused() -> None:
    with pytest.raises(UnweaveError, match="d_in and d_out must be equal, found 4 and 3"):
        build("mp", 4, 8, d_out=3, k=2)
    with pytest.raises(UnweaveError, match="cannot learn a target of its own"):
        unweave.fit(torch.randn(64, 4), "mp", k=2, target=torch.randn(64, 4))
    with pytest.raises(UnweaveError, match="tolerance"):
        build("mp", 4, 8, k=2, tolerance=-1.0)
    with pytest.raises(UnweaveError, match=r"scales 2\.0 and 3\.0"):
        made().fold_scale(2.0, 3.0)


# ---- the tree -------------------------------------------------------------------------------------------------------


# 6000 steps of 200 rows at the authors' rate. Measured over 4 seeds at cosines 0, 0.1 and 0.4 within a level: MMCS
# 1.000 and a cosine below 0.0001 in 10 of 12 after 3000 steps, and in the other two (seed 3) after 6000. Not every run
# gets there, and which does not is for a processor's last bits to say: on one, cosine 0.4 with seed 0 does in 3000 and
# in 4500 steps, and in 6000 ends at 0.947, an atom short.
@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1, 4])
def test_it_takes_a_tree_apart_where_parents_are_orthogonal_to_children(level: int) -> None:
    arrived = []
    for seed in (0, 1, 3):
        generator = torch.Generator().manual_seed(seed)
        atoms = trees.directions(level, generator)
        x = trees.rows(100_000, atoms, generator)
        found = unweave.training.fit(
            x, "mp", n_features=20, k=20, variant="adaptive", lr=0.03, n_rows=200 * 6000, batch_size=200, seed=seed
        )
        mmcs, across = trees.measures(found.decoder_directions(), atoms)
        arrived.append(mmcs >= 0.99 and abs(across) <= 0.01)
        assert mmcs >= 0.9
    assert sum(arrived) >= 2


# Measured over 3 seeds at three cosines: MMCS 0.920 to 0.922, cosine 0.47 to 0.54.
@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1, 4])
@pytest.mark.parametrize("seed", [0, 1, 3])
def test_a_linear_encoder_mixes_the_parent_into_the_child(level: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    atoms = trees.directions(level, generator)
    x = trees.rows(100_000, atoms, generator)
    found = unweave.training.fit(
        x, "relu", n_features=20, l1_coefficient=0.03, lr=3e-3, n_rows=200 * 3000, batch_size=200, seed=seed
    )
    mmcs, across = trees.measures(found.decoder_directions(), atoms)
    assert across >= 0.3
    assert mmcs < 0.99
