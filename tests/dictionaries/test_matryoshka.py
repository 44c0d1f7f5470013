"""Matryoshka: what its prefixes learn, and what it is without any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import unweave.training
from unweave.dictionaries import TrainingBatch, build
from unweave.errors import UnweaveError
from unweave.metrics import fvu

BAD = [
    ({"group_fractions": (0.5, 0.4)}, "add up to 1"),
    ({"group_fractions": (1e-4, 1 - 1e-4)}, "one is empty"),
    ({"group_fractions": (0.5, 0.5), "group_weights": (1.0,)}, "group_weights must be 2 numbers"),
    ({"group_fractions": (0.5, 0.5), "group_weights": (1.0, 0.0)}, "the last one above 0"),
]


def test_one_group_is_batch_topk() -> None:
    torch.manual_seed(0)
    one = build("matryoshka", 12, 40, k=3, group_fractions=(1.0,)).double().train()
    plain = build("batch_topk", 12, 40, k=3).double().train()
    plain.load_state_dict(one.state_dict())
    x, dead = torch.randn(64, 12, dtype=torch.float64), torch.rand(40) < 0.3
    losses = [d.loss(TrainingBatch(x, x, dead)).total for d in (one, plain)]
    torch.testing.assert_close(*losses)
    for a, b in zip(
        torch.autograd.grad(losses[0], one.parameters()), torch.autograd.grad(losses[1], plain.parameters())
    ):
        torch.testing.assert_close(a, b)


def test_prefix_ends_are_shares_of_the_features() -> None:
    assert build("matryoshka", 8, 64, k=2).config.prefix_ends() == [2, 6, 14, 30, 64]
    assert build("matryoshka", 8, 7, k=2, group_fractions=(0.5, 0.5)).config.prefix_ends() == [4, 7]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_groups_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        build("matryoshka", 8, 64, k=2, **options)


# Measured over 3 seeds: FVU of the prefixes 0.79 to 0.84, 0.55 to 0.58 and 0.08 to 0.10.
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_every_prefix_reconstructs_better_than_the_one_before(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(64, 32, generator=generator), dim=1)
    active = torch.rand(10_000, 64, generator=generator).topk(3, 1).indices
    values = torch.rand(10_000, 3, generator=generator) + 0.5
    rows = torch.zeros(10_000, 64).scatter_(1, active, values) @ atoms
    found = unweave.training.fit(
        rows, "matryoshka", n_features=64, k=3, n_rows=900 * 512, batch_size=512, seed=seed,
        group_fractions=(0.125, 0.25, 0.625),
    )  # fmt: skip
    with torch.no_grad():
        z = found.encode(rows).dense()
        errors = [fvu(rows, z[:, :end] @ found.W_dec[:end] + found.b_dec) for end in found.config.prefix_ends()]
    assert errors[0] > errors[1] + 0.1 > errors[2] + 0.2
    assert errors[2] < 0.2
