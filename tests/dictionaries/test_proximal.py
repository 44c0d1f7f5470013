"""Each proximal step against a search of a dense grid."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from unweave.dictionaries import build
from unweave.dictionaries.proximal import (
    prox_cardinality,
    prox_cardinality_nonnegative,
    prox_l0,
    prox_l0_nonnegative,
    prox_l1_nonnegative,
)

GRID = torch.arange(-60_000, 60_001, dtype=torch.float64) / 10_000  # holds 0
U = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5


@pytest.mark.parametrize("penalty", [0.1, 0.5, 1.3])
@pytest.mark.parametrize(
    ("prox", "count", "least"),
    [(prox_l1_nonnegative, False, 0.0), (prox_l0_nonnegative, True, 0.0), (prox_l0, True, -6.0)],
)
def test_a_penalty_on_each_entry(prox, count: bool, least: float, penalty: float):
    grid = GRID.clamp_min(least)
    size = (grid != 0).double() if count else grid.abs()
    found = prox(U, penalty)
    values = (grid - U[:, None]).square() / 2 + penalty * size
    best = values.min(1)
    ours = (found - U).square() / 2 + penalty * ((found != 0).double() if count else found.abs())
    assert (ours <= best.values + 1e-12).all()
    assert float((found - grid[best.indices]).abs().max()) < 1e-4


@pytest.mark.parametrize("nonnegative", [True, False])
def test_a_bound_on_their_number(nonnegative: bool):
    """All supports of 2 of 6 entries, with a grid over the values of each."""
    u = U.reshape(10, 6)
    grid = GRID[GRID >= 0] if nonnegative else GRID
    nearest = grid[(u[..., None] - grid).abs().min(-1).indices]
    options = []
    for support in combinations(range(6), 2):
        z = torch.zeros_like(u)
        z[:, support] = nearest[:, support]
        options.append((z - u).square().sum(1))
    best = torch.stack(options).min(0).values
    found = (prox_cardinality_nonnegative if nonnegative else prox_cardinality)(u, 2)
    assert int((found != 0).sum(1).max()) <= 2
    assert float(found.min()) >= 0 or not nonnegative
    assert ((found - u).square().sum(1) <= best + 1e-7).all()


def identity(arch: str, **options) -> Tensor:
    dictionary = build(arch, 6, 6, **options).double().eval()
    with torch.no_grad():
        dictionary.W_enc.copy_(torch.eye(6))
        if arch == "jumprelu":
            dictionary.log_threshold.fill_(torch.tensor(0.8).log())
        if arch == "relu":
            dictionary.b_enc.fill_(-0.3)
        return dictionary.encode(U.reshape(10, 6)).dense()


def test_they_are_the_encoders_of_the_architectures():
    u = U.reshape(10, 6)
    assert torch.equal(identity("topk", k=2), prox_cardinality_nonnegative(u, 2))
    assert torch.equal(identity("abs_topk", k=2), prox_cardinality(u, 2))
    assert torch.equal(identity("jumprelu", target_l0=3.0), prox_l0_nonnegative(u, 0.8**2 / 2))
    torch.testing.assert_close(identity("relu"), prox_l1_nonnegative(u, 0.3))
