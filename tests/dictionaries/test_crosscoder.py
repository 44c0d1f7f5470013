"""Crosscoders: whose feature it is, at any scale of the sites; and that with one site they are plain dictionaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unweave
from unweave.dictionaries import TrainingBatch, build, model_diff, relative_norms
from unweave.errors import UnweaveError
from unweave.metrics import fvu

D, SHARED, OWN = 16, 12, 6


def planted(seed: int, ratio: float = 100.0) -> tuple[Tensor, Tensor]:
    """Rows of two models, B's ``ratio`` times as long, and the ``(24, 2 D)`` planted atoms: 12 shared, 6 A's, 6 B's."""
    g = torch.Generator().manual_seed(seed)
    n = SHARED + 2 * OWN
    a, b = (F.normalize(torch.randn(n, D, generator=g), dim=1) for _ in range(2))
    a[SHARED + OWN :], b[SHARED : SHARED + OWN] = 0, 0
    active = torch.rand(6000, n, generator=g).topk(3, 1).indices
    z = torch.zeros(6000, n).scatter_(1, active, torch.rand(6000, 3, generator=g) + 0.5)
    return torch.cat([z @ a, ratio * (z @ b)], dim=1), torch.cat([a, b], dim=1)


# Seeds 0-2 (600 steps), FVU of either part and r of the learnt atom nearest to each planted one:
#   crosscoder            0.003 to 0.004, A's own at most 0.000, B's own at least 1.000, shared ones 0.40 to 0.65
#   topk_crosscoder       0.030 to 0.037, at most 0.17, at least 0.84, 0.48 to 0.51 (no penalty takes the last bit away)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("arch", "options", "slack", "worst"),
    [
        ("crosscoder", {"l1_coefficient": 0.05}, 0.05, 0.02),
        pytest.param("topk_crosscoder", {"k": 3}, 0.25, 0.2, marks=pytest.mark.slow),
    ],
)
def test_a_feature_of_one_model_is_found_to_be_its_own(
    arch: str, options: dict[str, Any], slack: float, worst: float, seed: int
) -> None:
    rows, truth = planted(seed)
    found = unweave.fit(rows, arch, n_features=48, n_rows=600 * 256, batch_size=256, lr=5e-3, seed=seed, **options)
    with torch.no_grad():
        assert max(fvu(rows[:, :D], found(rows)[:, :D]), fvu(rows[:, D:], found(rows)[:, D:])) < worst
        alive = found.encode(rows).firing_counts() > 5
        equal = found.part_atoms() / torch.tensor([1.0, 100.0])[:, None]
        likeness = F.normalize(truth, dim=1) @ F.normalize(equal.flatten(1), dim=1).T * alive
        r = relative_norms(found)[likeness.argmax(1)]
    assert float(r[SHARED : SHARED + OWN].max()) < slack
    assert float(r[SHARED + OWN :].min()) > 1 - slack
    assert float((r[:SHARED] - 0.5).abs().max()) < 0.25
    assert float(likeness.amax(1)[:SHARED].mean()) > 0.95
    if arch == "crosscoder":  # the atoms nearest to those planted for one model are sorted into that model's
        diff, nearest = model_diff(found, alive=alive), likeness.argmax(1)
        assert bool(diff.only_a[nearest[SHARED : SHARED + OWN]].all())
        assert bool(diff.only_b[nearest[SHARED + OWN :]].all())
        assert not bool((diff.shared & (diff.only_a | diff.only_b)).any())


@pytest.mark.parametrize(
    ("arch", "options"),
    [("crosscoder", {}), pytest.param("batch_topk_crosscoder", {"k": 3}, marks=pytest.mark.slow)],
)
def test_identical_sources_give_relative_norms_of_one_half(arch: str, options: dict[str, Any]) -> None:
    """Atoms of the two sides start apart and come together: r is 0.5 +- 0.022 and +- 0.033 here, cosines above 0.91."""
    half = planted(0)[0][:, :D]
    rows = torch.cat([half, half], dim=1)
    found = unweave.fit(rows, arch, n_features=48, n_rows=300 * 256, batch_size=256, lr=5e-3, **options)
    alive = found.encode(rows).firing_counts() > 0
    diff = model_diff(found, alive=alive)
    assert float((diff.relative[alive] - 0.5).abs().max()) < 0.1
    assert float(diff.cosine[alive].min()) > 0.8
    assert torch.equal(diff.shared, alive)


def test_identical_sources_and_equal_starts_stay_exactly_equal() -> None:
    half = planted(0)[0][:200, :D].double()
    rows = torch.cat([half, half], dim=1)
    found = build("crosscoder", 2 * D, 30).double()
    with torch.no_grad():
        for weights in (found.W_enc, found.W_dec):
            weights[:, D:] = weights[:, :D]
    found.initialise(rows, rows)
    optimiser = torch.optim.Adam(found.parameters(), lr=1e-2)
    for _ in range(20):
        loss = found.loss(TrainingBatch(rows, rows))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    torch.testing.assert_close(relative_norms(found), torch.full((30,), 0.5).double())
    assert float((found.part_norms() - 0.08).abs().max()) > 0.01


def test_with_one_part_it_is_the_april_update() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 8).double(), torch.randn(40, 8).double()
    one = build("crosscoder", 8, 30, n_parts=1, l1_coefficient=0.3).double()
    april = build("relu", 8, 30, variant="april", l1_coefficient=0.3).double()
    april.load_state_dict({name: value for name, value in one.state_dict().items() if name in april.state_dict()})
    for progress in (0.02, 1.0):
        batch = TrainingBatch(x, y, None, progress)
        ours, theirs = one.loss(batch), april.loss(batch)
        torch.testing.assert_close(ours.total, theirs.total)
        for a, b in zip(
            torch.autograd.grad(ours.total, one.parameters()), torch.autograd.grad(theirs.total, april.parameters())
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("arch", ["topk", "batch_topk"])
def test_with_one_part_and_unit_atoms_it_is_the_plain_dictionary(arch: str) -> None:
    torch.manual_seed(0)
    x, dead = torch.randn(40, 8).double(), torch.arange(30) < 9
    plain = build(arch, 8, 30, k=3, subtract_bias=False).double().train()
    one = build(f"{arch}_crosscoder", 8, 30, k=3, n_parts=1).double().train()
    one.load_state_dict({**one.state_dict(), **plain.state_dict()})
    ours, theirs = (d.loss(TrainingBatch(x, x, dead)) for d in (one, plain))
    torch.testing.assert_close(ours.total, theirs.total)
    torch.testing.assert_close(ours.code.dense(), theirs.code.dense())
    for dictionary, loss in ((one, ours), (plain, theirs)):
        dictionary.observe(loss, 1.0)
        dictionary.eval()
    torch.testing.assert_close(one.encode(x).dense(), plain.encode(x).dense())


@pytest.mark.parametrize("arch", ["topk_crosscoder", "batch_topk_crosscoder"])
def test_features_are_chosen_by_what_they_write(arch: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 12).double()
    dictionary = build(arch, 12, 30, k=3, n_parts=3).double().train()
    with torch.no_grad():
        dictionary.W_dec.mul_(torch.rand(30, 1) * 5)
    ranks = dictionary.pre_activations(x).relu() * dictionary.W_dec.view(30, 3, 4).norm(dim=2).sum(1)
    code = dictionary.encode(x)
    kept = ranks.topk(3, 1).indices if arch == "topk_crosscoder" else ranks.flatten().topk(3 * 40).indices
    mask = torch.zeros_like(ranks)
    mask.scatter_(1, kept, 1.0) if arch == "topk_crosscoder" else mask.view(-1).index_fill_(0, kept, 1.0)
    torch.testing.assert_close(code.dense(), dictionary.pre_activations(x).relu() * mask)
    scale = torch.rand(30, 1).double() + 0.5
    with torch.no_grad():  # code and atom trade scale: neither choice nor output may change
        dictionary.W_enc.mul_(scale)
        dictionary.b_enc.mul_(scale[:, 0])
        before = dictionary.decode(code)
        dictionary.W_dec.div_(scale)
    torch.testing.assert_close(dictionary(x), before)


@pytest.mark.parametrize("arch", ["topk_crosscoder", "batch_topk_crosscoder"])
def test_the_encoder_begins_with_the_gain_of_least_error(arch: str) -> None:
    rows, _ = planted(0)
    torch.manual_seed(0)
    dictionary = build(arch, 2 * D, 48, k=3)
    dictionary.initialise(rows, rows)
    units = dictionary.scaled_target(torch.ones_like(rows))

    def error() -> float:
        return float(((rows - dictionary(rows)) * units).detach().square().sum())

    least = error()
    for factor in (0.9, 1.1):
        with torch.no_grad():
            dictionary.W_enc.mul_(factor)
            assert error() > least
            dictionary.W_enc.div_(factor)


def test_the_parameters_are_counted_as_published() -> None:
    """L (2 m d + d) + m; 50,349,568 for two sites of width 768 and 16,384 features."""
    dictionary = build("crosscoder", 20, 50, n_parts=2)
    assert sum(p.numel() for p in dictionary.parameters()) == 2 * (2 * 50 * 10 + 10) + 50
    with torch.device("meta"):
        big = build("crosscoder", 2 * 768, 16_384, n_parts=2)
    assert sum(p.numel() for p in big.parameters()) == 50_349_568


def test_what_has_no_two_parts_is_refused() -> None:
    for other in (build("topk", 8, 16, k=2), build("crosscoder", 9, 16, n_parts=3)):
        with pytest.raises(UnweaveError, match="expected a crosscoder of two parts"):
            model_diff(other)
    with pytest.raises(UnweaveError, match="overlap"):
        model_diff(build("crosscoder", 8, 16), exclusive=0.3, even=0.3)
