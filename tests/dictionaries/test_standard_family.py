"""What holds for every member of the standard family, and which of them are others in disguise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import unweave.training
from unweave.dictionaries import Dictionary, TrainingBatch, build
from unweave.errors import UnweaveError

MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated": ("gated", {}),
    "gated anneal": ("gated", {"p_end": 0.3}),
    "p_anneal": ("p_anneal", {}),
    "group_max": ("group_max", {"k": 3}),
    "hierarchical_topk": ("hierarchical_topk", {"k": 3}),
    "multi_topk": ("multi_topk", {"k": 3}),
    "ort": ("ort", {"k": 3, "chunk_size": 10}),
    "switch": ("switch", {"k": 3, "n_experts": 4}),
    "matryoshka random": ("matryoshka", {"k": 3, "prefixes": "random", "n_prefixes": 3}),
    "matryoshka_topk": ("matryoshka_topk", {"k": 3, "group_fractions": (0.1, 0.3, 0.6)}),
    "matryoshka_jumprelu": ("matryoshka_jumprelu", {"target_l0": 3.0, "group_fractions": (0.1, 0.3, 0.6)}),
    "jumprelu tanh": ("jumprelu", {"target_l0": 3.0, "penalty": "tanh", "sparsity_coefficient": 1e-3}),
}

# Left and right are the same, weights for weights; what the left has besides changes nothing at its start.
REDUCTIONS: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "hierarchical({k}) = topk": (("hierarchical_topk", {"k": 5, "budgets": (5,)}), ("topk", {"k": 5})),
    "multi(0) = topk": (("multi_topk", {"k": 5, "multi_coefficient": 0.0}), ("topk", {"k": 5})),
    "switch(E = 1) = topk": (
        ("switch", {"k": 5, "n_experts": 1, "balance_coefficient": 0.0}),
        ("topk", {"k": 5, "auxk_coefficient": 0.0}),
    ),
    "ort(0) = batch_topk": (("ort", {"k": 5, "ort_coefficient": 0.0}), ("batch_topk", {"k": 5})),
    "group_max(one group) = topk(1)": (("group_max", {"k": 1}), ("topk", {"k": 1})),
    "group_max(groups of one) = topk(all)": (("group_max", {"k": 40}), ("topk", {"k": 40})),
    "p_anneal(p = 1) = relu": (
        ("p_anneal", {"p_end": 1.0, "sparsity_coefficient": 0.04}),
        ("relu", {"variant": "standard", "l1_coefficient": 0.04}),
    ),
    "matryoshka_topk(one group) = topk": (("matryoshka_topk", {"k": 5, "group_fractions": (1.0,)}), ("topk", {"k": 5})),
    "matryoshka_jumprelu(one group) = jumprelu": (
        ("matryoshka_jumprelu", {"target_l0": 5.0, "group_fractions": (1.0,), "bandwidth": 0.3}),
        ("jumprelu", {"target_l0": 5.0, "bandwidth": 0.3}),
    ),
    "matryoshka(one random prefix) = batch_topk": (
        ("matryoshka", {"k": 5, "prefixes": "random", "n_prefixes": 1}),
        ("batch_topk", {"k": 5}),
    ),
}


@pytest.fixture(scope="module")
def rows() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(600, 12, generator=generator) * torch.linspace(0.3, 2, 12) + 0.5


@pytest.mark.parametrize("member", MEMBERS)
def test_it_trains_and_comes_back_from_a_file(member: str, rows: Tensor, tmp_path) -> None:
    arch, options = MEMBERS[member]
    settings = {"n_features": 40, "n_rows": 40 * 50, "batch_size": 50, "seed": 1, **options}
    dictionary = unweave.training.fit(rows, arch, **settings)
    dictionary.save(tmp_path)
    again = Dictionary.load(tmp_path)
    code, same = dictionary.encode(rows), again.encode(rows)
    assert again.config == dictionary.config
    assert torch.equal(code.indices, same.indices)
    assert torch.equal(code.values, same.values)
    assert torch.equal(dictionary(rows), again(rows))
    with torch.no_grad():
        assert unweave.metrics.fvu(rows, dictionary(rows)) < 1
        # Rows one by one, and in another order, have the codes they had together.
        alone = torch.cat([dictionary.encode(rows[i : i + 1]).dense() for i in range(30)])
        torch.testing.assert_close(alone, code[:30].dense(), rtol=1e-4, atol=1e-5)
        assert dictionary.encode(rows[:0]).shape == (0, 40)
    # A power of two changes no bit of what is learnt, and codes come in the units of the rows.
    large = unweave.training.fit(rows * 64, arch, **settings).encode(rows * 64)
    assert torch.equal(large.indices, code.indices)
    torch.testing.assert_close(large.values, code.values * 64, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("member", MEMBERS)
def test_folding_two_scales_for_a_target_of_its_own(member: str) -> None:
    arch, options = MEMBERS[member]
    torch.manual_seed(0)
    dictionary = build(arch, 12, 40, d_out=7, subtract_bias=False, **options).double()
    x, y = torch.randn(64, 12, dtype=torch.float64), torch.randn(64, 7, dtype=torch.float64)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        dictionary.W_dec.copy_(torch.nn.functional.normalize(dictionary.W_dec, dim=1))
    dictionary.train()
    dictionary.after_step(dictionary.loss(TrainingBatch(x, y)), 1.0)
    dictionary.eval()
    before, code = dictionary(x), dictionary.encode(x)
    dictionary.fold_scale(4.0, 0.5)
    folded = dictionary.encode(x / 4.0)
    torch.testing.assert_close(dictionary(x / 4.0), before / 0.5)
    torch.testing.assert_close(folded.dense(), code.dense() / 0.5)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(40, dtype=torch.float64))


@pytest.mark.parametrize("case", REDUCTIONS)
def test_it_is_another_one_in_disguise(case: str) -> None:
    """Loss, codes and every gradient (on the sphere of the atoms), in float64, with a third of the features dead."""
    (left, options), (right, others) = REDUCTIONS[case]
    torch.manual_seed(0)
    plain, disguised = build(right, 12, 40, **others).double(), build(left, 12, 40, **options).double()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        plain.W_dec.copy_(torch.nn.functional.normalize(plain.W_dec, dim=1))
    disguised.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(64, 12, dtype=torch.float64)
    batch = TrainingBatch(x, x, torch.arange(40) % 3 == 0)
    losses = {d: d.train().loss(batch) for d in (plain, disguised)}
    torch.testing.assert_close(losses[disguised].total, losses[plain].total)
    torch.testing.assert_close(losses[disguised].code.dense(), losses[plain].code.dense())
    for dictionary, loss in losses.items():
        loss.total.backward()
        dictionary.before_step()
        dictionary.after_step(loss, 1.0)
    ours = dict(disguised.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    plain.eval()
    disguised.eval()
    torch.testing.assert_close(disguised.encode(x).dense(), plain.encode(x).dense())


def test_only_the_standard_relu_subtracts_the_bias_of_an_autoencoder() -> None:
    assert build("relu", 12, 40, variant="standard").config.subtract_bias
    assert not build("relu", 12, 40).config.subtract_bias
    assert not build("relu", 12, 40, d_out=7, variant="standard").config.subtract_bias
    config = build("relu", 12, 40, variant="standard", subtract_bias=False).config
    assert not type(config).from_json(config.to_json()).subtract_bias


BAD = [
    ("hierarchical_topk", {"k": 4, "budgets": (1, 2)}, "budgets must rise and end with k = 4"),
    ("hierarchical_topk", {"k": 4, "budgets": (3, 2, 4)}, "budgets must rise"),
    ("switch", {"k": 2, "n_experts": 7}, "n_experts must divide n_features = 40"),
    ("switch", {"k": 12, "n_experts": 4}, "k must be at most the 10 features of an expert"),
    ("group_max", {"k": 41}, "k must be at most n_features = 40"),
    ("p_anneal", {"p_end": 0.0}, "p_end: Input should be greater than 0"),
    ("ort", {"k": 2, "chunk_size": 1}, "chunk_size: Input should be greater than or equal to 2"),
    ("matryoshka", {"k": 2, "prefixes": "random", "group_weights": (1.0,)}, "group_weights belong to fixed prefixes"),
    ("jumprelu", {"penalty": "l2"}, "Input should be 'target', 'l0' or 'tanh'"),
]


@pytest.mark.parametrize(("arch", "options", "message"), BAD)
def test_options_that_make_no_sense_are_refused(arch: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        build(arch, 12, 40, **options)


@pytest.mark.parametrize(
    ("arch", "published"), [("topk", 2e-4), ("relu", 3e-4), ("gated", 3e-4), ("p_anneal", 3e-4), ("crosscoder", 5e-5)]
)
def test_the_published_rate_is_that_of_its_width(arch: str, published: float) -> None:
    narrow, wide = build(arch, 4, 2**10), build(arch, 4, 2**14)
    assert wide.default_lr() == pytest.approx(published)
    assert narrow.default_lr() == pytest.approx(4 * published)
