from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unweave.features import IndexConfig, build_features


def test_numbers(hand_made):
    cat, sat, always, dead = hand_made
    assert (cat.n_firing, cat.n_items, cat.max_value, cat.mean_value) == (5, 2, 5.0, pytest.approx(3.2))
    assert cat.density == pytest.approx(5 / 13)
    assert (sat.n_firing, sat.n_negative, sat.max_value, sat.mean_value) == (2, 2, 4.0, 2.75)
    assert (always.density, always.n_items) == (1.0, 3)
    assert (dead.is_dead, dead.density, dead.max_value, dead.mean_value) == (True, 0.0, 0.0, 0.0)


def test_top_contexts_one_per_item_with_the_first_peak(hand_made):
    first, second = hand_made[0].top
    assert (first.document, first.position, first.item, first.value, first.peak) == (9, 1, 2, 5.0, 1)
    assert first.tokens == [" cat"] * 4  # the item ends the window
    assert first.values == [1, 5, 5, 3]
    assert (second.document, second.position, second.peak) == (5, 1, 1)
    assert second.text == "the cat sat on"
    assert second.values == [0, 2, 0, 0]
    assert second.marked() == "the» cat« sat on"


def test_negative_features_keep_their_sign(hand_made):
    strong, weak = hand_made[1].top
    assert (strong.value, strong.values[strong.peak]) == (-4.0, -4.0)
    assert (weak.value, weak.position, weak.text) == (-1.5, 9, "the Dog sat")


def test_equal_values_are_shown_in_order_of_position(hand_made):
    assert [(c.document, c.position) for c in hand_made[2].top] == [(5, 1), (5, 7), (9, 0)]


def test_contexts_of_another_size(hand_made):
    assert [c.text for c in hand_made[1].contexts(1, before=0, after=1)] == [" sat on"]
    assert hand_made[1].texts(1) == ["the cat sat onthe"]


def test_a_character_is_not_cut_at_the_windows_edge(planted, tmp_path):
    fox = "🦊".encode()
    words = [b"a", fox[:2], fox[2:], b"b"]
    dense = torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    store = build_features(
        tmp_path / "f", planted.dictionary(dense), [planted.batch([(0, 0, [0, 1, 2, 3], [0, 1, 2, 3])])],
        token_bytes=words, config=IndexConfig(before=1, after=1),
    )  # fmt: skip
    context = store[0].top[0]
    assert context.tokens == ["🦊", "", "b"]
    assert context.peak == 1
    assert context.marked() == "»🦊«b"
    assert store[0].contexts(before=0, after=1)[0].tokens == ["", "b"]
    assert store[0].contexts(before=2, after=0)[0].text == "a🦊"
    assert store[0].top_tokens == [("<A6 8A>", 1.0)]


def test_relations(hand_made):
    cat, _, always, dead = hand_made
    assert cat.top_tokens == [(" cat", 1.0)]
    assert always.top_tokens[:2] == [(" cat", pytest.approx(5 / 13)), ("the", pytest.approx(2 / 13))]
    # Feature 2 fires everywhere, so it is no news where feature 0 fires; feature 0 alone tells nothing of 2.
    assert cat.cofiring == []
    assert cat.similar[0] == (1, pytest.approx(math.sqrt(0.5)))
    assert cat.similar[-1] == (3, pytest.approx(-1.0))
    assert len(cat.similar) == 3
    assert dead.similar[0][0] == 2
    assert cat.positive_logits == [(" cat", 3.0), (" sat", 1.0)]
    assert cat.negative_logits == [(" Dog", -2.0), ("\n", -1.0)]
    assert dead.positive_logits[0] == (" Dog", 2.0)


def test_cofiring_probability_and_lift(planted, tmp_path):
    """Of 10 rows: a in 0-3, b in 0-2 and 8, c in 3 and 9, d in 5."""
    dense = torch.zeros(10, 4)
    dense[0:4, 0] = dense[[0, 1, 2, 8], 1] = dense[[3, 9], 2] = dense[5, 3] = 1.0
    batch = planted.batch([(0, 0, [0] * 10, list(range(10)))])
    a, b, c, d = build_features(tmp_path / "f", planted.dictionary(dense), [batch])
    assert a.cofiring == [(1, 0.75, pytest.approx(0.75 / 0.4))]  # c only once: no evidence
    assert b.cofiring == [(0, 0.75, pytest.approx(0.75 / 0.4))]
    assert c.cofiring == []
    assert d.cofiring == []


def test_quantiles_cut_the_firings_into_equal_parts(planted, tmp_path):
    """Values 1..20, one per item, all sampled: five intervals of four."""
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    dense = (order + 1.0)[:, None]
    items = [(i, 0, [0], [i]) for i in range(20)]
    config = IndexConfig(per_interval=3)
    (feature,) = build_features(tmp_path / "f", planted.dictionary(dense), [planted.batch(items)], config=config)
    bounds = [(q.low, q.high) for q in feature.quantiles]
    assert bounds == [(17, 20), (13, 17), (9, 13), (5, 9), (0, 5)]
    for quantile, lowest in zip(feature.quantiles, (17, 13, 9, 5, 1)):
        values = [c.value for c in quantile.contexts]
        assert len(values) == len(set(values)) == 3
        assert set(values) <= set(range(lowest, lowest + 4))
        assert values == sorted(values, reverse=True)


def test_quantiles_of_few_firings(hand_made):
    assert [(q.low, q.high, [c.value for c in q.contexts]) for q in hand_made[1].quantiles] == [
        (4.0, 4.0, [-4.0]),
        (0.0, 4.0, [-1.5]),
    ]
    assert hand_made[3].quantiles == []
    assert hand_made[3].top == []


def test_quantiles_prefer_different_items(planted, tmp_path):
    dense = torch.full((40, 1), 2.0)
    dense[30:] += torch.arange(10)[:, None] / 100
    items = [(0, 0, [0] * 31, list(range(31))), *((i, 0, [0], [30 + i]) for i in range(1, 10))]
    config = IndexConfig(n_intervals=1, per_interval=10)
    (feature,) = build_features(tmp_path / "f", planted.dictionary(dense), [planted.batch(items)], config=config)
    assert sorted(c.document for c in feature.quantiles[0].contexts) == list(range(10))


@pytest.mark.parametrize("scale", [1e-5, 1.0, 3e4])
def test_histogram_has_a_readable_number_of_bins(planted, tmp_path, scale):
    dense = (torch.rand(5000, 1, generator=torch.Generator().manual_seed(0)) + 0.001) * scale
    items = [(i, 0, [0] * 100, list(range(100 * i, 100 * i + 100))) for i in range(50)]
    (feature,) = build_features(tmp_path / "f", planted.dictionary(dense), [planted.batch(items)])
    edges, counts = feature.histogram
    assert 30 <= len(counts) <= 40
    assert counts.sum() == 5000
    assert edges[0] <= float(dense.min())
    assert edges[-1] >= float(dense.max())
    assert np.allclose(np.diff(edges), edges[1] - edges[0])


def test_card_in_text(hand_made):
    text = repr(hand_made[0])
    assert "Feature 0: fires on 38% of rows (5) in 2 items, max 5, mean 3.2" in text
    assert "' cat' 100%" in text
    assert "raises     ' cat' +3.00" in text
    assert "the» cat« sat" in text
    assert "never fired in 13 rows" in repr(hand_made[3])
