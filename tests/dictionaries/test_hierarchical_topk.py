"""HierarchicalTopK and Multi-TopK: one dictionary for several numbers of features a row."""

from __future__ import annotations

import pytest
import torch
from tests.dictionaries.toys import graded
from torch import Tensor

import unweave.training
from unweave.codes import SparseCode
from unweave.dictionaries import HierarchicalTopK, TrainingBatch, build
from unweave.dictionaries.hierarchical_topk import ranked, ranks
from unweave.errors import UnweaveError
from unweave.metrics import fvu


def cut(dictionary, x: Tensor, k: int) -> SparseCode:
    """The k largest values of each row of a TopK code."""
    code = dictionary.encode(x)
    return SparseCode.from_pattern(*ranks(code.pattern, *ranked(code.values, len(x)), 0, k))


@pytest.mark.parametrize("budgets", [None, (1, 3, 6)])
def test_the_loss_is_the_mean_over_the_budgets(budgets) -> None:
    torch.manual_seed(0)
    dictionary = build("hierarchical_topk", 12, 40, k=6, budgets=budgets).double().train()
    x = torch.randn(50, 12, dtype=torch.float64)
    loss = dictionary.loss(TrainingBatch(x, x))
    loss.total.backward()
    ours = {name: p.grad.clone() for name, p in dictionary.named_parameters()}
    dictionary.zero_grad()
    u, total = dictionary.pre_activations(x), torch.zeros(())
    for j in budgets or range(1, 7):
        kept = u.topk(j, dim=1)
        z = torch.zeros_like(u).scatter(1, kept.indices, kept.values.relu())
        total = total + (x - z @ dictionary.W_dec - dictionary.b_dec).square().sum(1).mean() / len(budgets or range(6))
    total.backward()
    torch.testing.assert_close(loss.total, total)
    for name, parameter in dictionary.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_code_can_be_cut_to_any_length() -> None:
    torch.manual_seed(0)
    dictionary = build("hierarchical_topk", 12, 40, k=6).eval()
    assert isinstance(dictionary, HierarchicalTopK)
    x = torch.randn(50, 12)
    for k in (1, 4, 6):
        u = dictionary.pre_activations(x)
        kept = u.topk(k, dim=1)
        expected = torch.zeros_like(u).scatter(1, kept.indices, kept.values.relu())
        torch.testing.assert_close(dictionary.encode_at(x, k).dense(), expected)
    assert len(dictionary.encode_at(x[:0], 2)) == 0
    with pytest.raises(UnweaveError, match="expected k from 1 to the 6 it was trained for, found 7"):
        dictionary.encode_at(x, 7)


# Over seeds 0 to 4, FVU with the 1, 2, 4, 8 and 16 largest values: 0.59 to 0.60, 0.38 to 0.39, 0.20 to 0.21, 0.13 and
# 0.11; TopK with k = 16 has 0.68 to 0.71, 0.50 to 0.53, 0.31 to 0.33, 0.16 and 0.070 to 0.076. So it wins wherever
# fewer than k are used, and pays for it at k itself.
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_one_dictionary_serves_every_budget_below_k(seed: int) -> None:
    rows = graded(seed, n=4000)
    settings = {"n_features": 128, "n_rows": 300 * 256, "batch_size": 256, "k": 16, "seed": seed}
    found = {arch: unweave.training.fit(rows, arch, **settings) for arch in ("hierarchical_topk", "topk")}
    with torch.no_grad():
        errors = {arch: [fvu(rows, d.decode(cut(d, rows, j))) for j in (1, 2, 4, 8, 16)] for arch, d in found.items()}
    ours, plain = errors["hierarchical_topk"], errors["topk"]
    assert ours == sorted(ours, reverse=True)
    assert all(a < b - 0.02 for a, b in zip(ours[:4], plain[:4]))


# Over seeds 0 to 4, FVU of k = 4 and of four times as many: Multi-TopK 0.18 and 0.17 to 0.18, TopK 0.18 and 0.29 to
# 0.32.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_multi_topk_bears_four_times_as_many_features(seed: int) -> None:
    rows = graded(seed, n=4000)
    settings = {"n_features": 128, "n_rows": 300 * 256, "batch_size": 256, "k": 4, "seed": seed}
    errors = {}
    for arch in ("multi_topk", "topk"):
        dictionary = unweave.training.fit(rows, arch, **settings)
        with torch.no_grad():
            kept = dictionary.pre_activations(rows).topk(16, dim=1)
            wide = SparseCode.from_fixed_k(kept.indices, kept.values.relu(), 128)
            errors[arch] = [fvu(rows, dictionary(rows)), fvu(rows, dictionary.decode(wide))]
    assert errors["multi_topk"][1] < errors["multi_topk"][0]
    assert errors["multi_topk"][0] < 1.1 * errors["topk"][0]
    assert errors["multi_topk"][1] < 0.8 * errors["topk"][1]
