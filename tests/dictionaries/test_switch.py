"""Switch and GroupMax: who may fire together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.dictionaries.toys import planted
from torch import Tensor

import unweave.training
from unweave.dictionaries import Switch, TrainingBatch, build
from unweave.metrics import fvu


def made() -> tuple[Switch, Tensor]:
    torch.manual_seed(0)
    dictionary = build("switch", 12, 40, k=3, n_experts=4).double().train()
    assert isinstance(dictionary, Switch)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dictionary, torch.randn(64, 12, dtype=torch.float64)


def test_the_loss_is_the_equation_written_densely() -> None:
    dictionary, x = made()
    loss = dictionary.loss(TrainingBatch(x, x))
    loss.total.backward()
    ours = {name: p.grad.clone() for name, p in dictionary.named_parameters()}
    dictionary.zero_grad()
    chances = ((x - dictionary.b_router) @ dictionary.W_router.T).softmax(1)
    expert = chances.argmax(1)
    u = (x - dictionary.b_dec) @ dictionary.W_enc.T + dictionary.b_enc
    own = torch.arange(40) // 10 == expert[:, None]
    kept = u.masked_fill(~own, -torch.inf).topk(3, dim=1).indices
    z = torch.zeros_like(u).scatter(1, kept, u.gather(1, kept).relu()) * chances.max(1, keepdim=True).values
    shares = F.one_hot(expert, 4).double().mean(0)
    total = (x - z @ dictionary.W_dec - dictionary.b_dec).square().sum(1).mean()
    total = total + 0.1 * 4 * (shares * chances.mean(0)).sum()
    total.backward()
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(loss.code.dense(), z.detach())
    for name, parameter in dictionary.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_row_has_features_of_one_expert_alone() -> None:
    dictionary, x = made()
    code = dictionary.encode(x)
    experts = [set((row.indices // 10).tolist()) for row in code]
    assert all(len(found) == 1 for found in experts)
    assert len(set.union(*experts)) == 4
    assert code.offsets.diff().unique().tolist() == [3]


def test_the_balance_is_least_where_experts_are_used_alike() -> None:
    dictionary, _ = made()
    alike = torch.full((8, 4), 0.25).double() + 1e-9 * torch.eye(4).repeat(2, 1).double()
    assert float(dictionary.imbalance(alike).detach()) == pytest.approx(1)
    assert float(dictionary.imbalance(torch.eye(4)[[2] * 8].double())) == pytest.approx(4)


# Over seeds 0 to 4, experts get 0.23 to 0.27 of the rows each, and FVU is 0.20 to 0.21; without the balance two of them
# get no more than two of 4,000 rows (0.24 to 0.28). TopK with as many features as one expert has 0.31 to 0.32.
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_experts_share_the_rows(seed: int) -> None:
    _, rows = planted(seed, n=4000)
    settings = {"n_rows": 300 * 256, "batch_size": 256, "k": 3, "seed": seed}
    switch = {"n_features": 128, "n_experts": 4, **settings}
    balanced = unweave.training.fit(rows, "switch", **switch)
    small = unweave.training.fit(rows, "topk", n_features=32, **settings)
    with torch.no_grad():
        shares = torch.bincount(balanced.route(rows).argmax(1), minlength=4) / 4000
        errors = [fvu(rows, d(rows)) for d in (balanced, small)]
    assert 0.2 < float(shares.min()) <= float(shares.max()) < 0.3
    assert errors[0] < 0.8 * errors[1]
    if seed:
        left_alone = unweave.training.fit(rows, "switch", balance_coefficient=0.0, **switch)
        with torch.no_grad():
            shares = torch.bincount(left_alone.route(rows).argmax(1), minlength=4) / 4000
            assert float(shares.sort().values[1]) < 0.01
            assert errors[0] < fvu(rows, left_alone(rows))


@pytest.mark.parametrize(("m", "k"), [(40, 5), (40, 7), (12, 12), (11, 4), (9, 1)])
def test_group_max_takes_the_strongest_of_each_group(m: int, k: int) -> None:
    torch.manual_seed(0)
    dictionary = build("group_max", 6, m, k=k).double().eval()
    x = torch.randn(30, 6, dtype=torch.float64)
    u = dictionary.pre_activations(x).detach()
    groups = [f * k // m for f in range(m)]
    sizes = [groups.count(g) for g in range(k)]
    assert max(sizes) - min(sizes) <= 1
    expected = torch.zeros_like(u)
    for g in range(k):
        members = torch.tensor([f for f in range(m) if groups[f] == g])
        best, at = u[:, members].max(1)
        expected[torch.arange(30), members[at]] = best.relu()
    torch.testing.assert_close(dictionary.encode(x).dense().detach(), expected)
