from __future__ import annotations

import os
import random
import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.features import FeatureStore, IndexConfig, _writer, build_features, merge

CONFIG = IndexConfig(n_top=4, n_sample=15, n_cofiring=4, before=2, after=1)
WORDS = [f" w{i}".encode() for i in range(50)]


def build(folder, case, batches, config=CONFIG):
    return build_features(folder, case.dictionary, batches, token_bytes=WORDS, config=config)


@pytest.fixture(scope="module")
def whole(random_case, planted, tmp_path_factory) -> FeatureStore:
    return build(tmp_path_factory.mktemp("whole") / "f", random_case, [planted.batch(random_case.items)])


def test_counts_are_those_of_the_dense_codes(whole, random_case):
    rows = random_case.rows
    assert whole.n_rows == len(rows)
    assert [f.n_firing for f in whole] == (rows != 0).sum(0).tolist()
    assert [f.n_negative for f in whole] == (rows < 0).sum(0).tolist()
    assert [f.max_value for f in whole] == rows.abs().amax(0).tolist()
    mean = rows.abs().sum(0) / (rows != 0).sum(0).clamp(min=1)
    assert [f.mean_value for f in whole] == pytest.approx(mean.tolist(), rel=1e-6)
    assert [f.density for f in whole] == pytest.approx(((rows != 0).sum(0) / len(rows)).tolist())


def test_top_contexts_are_the_exact_best_items(whole, random_case):
    for f in range(10):
        peaks = []
        for document, start, _, rows in random_case.items:
            fired = [(abs(float(random_case.dense[r, f])), start + j) for j, r in enumerate(rows) if r >= 0]
            best = max((v for v, _ in fired), default=0.0)
            if best > 0:
                peaks.append((-best, document, min(p for v, p in fired if v == best)))
        wanted = sorted(peaks)[:4]
        assert [(-abs(c.value), c.document, c.position) for c in whole[f].top] == wanted
        assert whole[f].n_items == len(peaks)


def test_histogram_counts_every_firing_in_its_bin(whole, random_case):
    for f in whole:
        edges, counts = f.histogram
        sizes = random_case.rows[:, f.index].abs().double()
        sizes = sizes[sizes > 0].numpy()
        assert counts.sum() == f.n_firing
        assert len(edges) == len(counts) + 1 <= 41
        if len(sizes):
            assert counts.tolist() == [int(((a <= sizes) & (sizes < b)).sum()) for a, b in pairwise(edges)]
            assert counts[0] > 0
            assert counts[-1] > 0


def test_order_and_size_of_batches_do_not_matter(whole, random_case, planted, tmp_path, content, monkeypatch):
    wanted = content(whole)
    monkeypatch.setattr(_writer, "_BLOCK_ENTRIES", 50)
    for seed, size in ((0, 1), (1, 7), (2, 60)):
        items = random_case.items.copy()
        random.Random(seed).shuffle(items)
        batches = [planted.batch(items[a : a + size]) for a in range(0, len(items), size)]
        assert content(build(tmp_path / f"{seed}", random_case, batches)) == wanted


def test_merging_parts_equals_building_the_whole(whole, random_case, planted, tmp_path, content):
    cuts = [0, 13, 20, 60]
    parts = [
        build(tmp_path / f"part{i}", random_case, [planted.batch(random_case.items[a:b])])
        for i, (a, b) in enumerate(pairwise(cuts))
    ]
    joined = merge(parts, tmp_path / "joined")
    assert content(joined) == content(whole)
    names = [n for n in whole.manifest["columns"] if n != "total"]  # a sum of floats: its last bit may differ
    for name in names:
        assert np.array_equal(joined.columns[name], whole.columns[name]), name
    assert np.allclose(joined.columns["total"], whole.columns["total"])
    again = FeatureStore.merge([FeatureStore.merge(parts[:2], tmp_path / "ab"), parts[2]], tmp_path / "abc")
    assert content(again) == content(whole)
    assert joined.manifest["counts"] == whole.manifest["counts"]


def test_merge_refuses_another_dictionary_or_config(whole, random_case, planted, tmp_path):
    batch = [planted.batch(random_case.items[:5])]
    other = build(tmp_path / "config", random_case, batch, CONFIG.replace(n_top=3))
    with pytest.raises(UnweaveError, match="differ in config"):
        merge([whole, other], tmp_path / "m")
    other = build_features(tmp_path / "dict", planted.dictionary(random_case.dense + 0, torch.ones(10, 4)), batch)
    with pytest.raises(UnweaveError, match="differ in dictionary"):
        merge([whole, other], tmp_path / "m")
    other = build_features(tmp_path / "words", random_case.dictionary, batch, token_bytes=WORDS * 2, config=CONFIG)
    with pytest.raises(UnweaveError, match="differ in vocabulary"):
        merge([whole, other], tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_bos_and_the_token_before_it_are_two_places(planted, tmp_path, content):
    """Items that start with a BOS at the position of the last token before: order must not matter there either."""
    dense = torch.full((60, 1), 2.0)
    items = [(0, 5 * i - 1, [0] * 6, list(range(6 * i, 6 * i + 6))) for i in range(10)]
    config = IndexConfig(n_top=3, n_sample=7)
    stores = [
        build_features(tmp_path / name, planted.dictionary(dense), [planted.batch(order)], config=config)
        for name, order in (("there", items), ("back", items[::-1]))
    ]
    assert content(stores[0]) == content(stores[1])
    assert [c.position for c in stores[0][0].top] == [-1, 4, 9]


def test_sample_is_uniform_over_firings(planted, tmp_path):
    """Value v stands at position v: the sampled values must be spread like all of them."""
    n = 4000
    dense = torch.arange(1.0, n + 1)[:, None]
    items = [(i, 0, [0] * 100, list(range(100 * i, 100 * i + 100))) for i in range(n // 100)]
    means = []
    for seed in range(12):
        store = build_features(
            tmp_path / f"{seed}", planted.dictionary(dense), [planted.batch(items)], config=IndexConfig(seed=seed)
        )
        _, values = store.entries("sample", 0)
        assert len(np.unique(values)) == 200
        means.append(values.mean())
        counts = np.histogram(values, np.linspace(0, n, 5))[0]
        assert counts.min() > 25  # 50 expected, standard deviation 6
    assert np.mean(means) == pytest.approx(n / 2, rel=0.03)  # standard error 0.012


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, "float16"), (1e5, "float32"), (1e-6, "float32")])
def test_values_are_kept_in_half_precision_only_when_they_fit(scale, dtype, planted, tmp_path):
    dense = torch.tensor([[1.0, 0.5], [0.0, 0.75]]) * scale
    batch = planted.batch([(0, 0, [0, 1], [0, 1])])
    store = build_features(tmp_path / "f", planted.dictionary(dense), [batch])
    assert store.columns["code_values"].dtype == dtype
    assert torch.equal(store.codes.dense().float(), dense)
    assert store[1].top[0].values == pytest.approx((dense[:, 1]).tolist())


def test_plain_vectors_without_tokens(planted, tmp_path):
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 0.0]])
    rows = torch.arange(3.0)[:, None]
    batches = [ActivationBatch.of_rows(rows[:2]), ActivationBatch.of_rows(rows[2:], first=2)]
    store = build_features(tmp_path / "f", planted.dictionary(dense), batches)
    assert [c.text for c in store[0].top] == ["row 2", "row 1"]
    assert store[0].top_tokens == []
    assert store[0].positive_logits == []
    assert store.list(search="row").total == 0
    assert store.list(search="1")[0].index == 1
    assert "row 2" in repr(store[0])
    assert "row 2" in store[0]._repr_html_()


def test_token_ids_without_a_vocabulary(planted, tmp_path):
    dense = torch.tensor([[0.0], [1.0], [2.0]])
    store = build_features(tmp_path / "f", planted.dictionary(dense), [planted.batch([(0, 0, [4, 5, 6], [0, 1, 2])])])
    assert store[0].top[0].text == "⟨4⟩ ⟨5⟩ ⟨6⟩"
    assert store[0].top_tokens == [("⟨5⟩", 0.5), ("⟨6⟩", 0.5)]


def test_a_killed_build_leaves_the_old_store_and_nothing_else(random_case, planted, tmp_path, content):
    def breaking():
        yield planted.batch(random_case.items[:10])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "f", random_case, breaking())
    assert list(tmp_path.iterdir()) == []

    old = content(build(tmp_path / "f", random_case, [planted.batch(random_case.items[:4])]))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "f", random_case, breaking())
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert content(FeatureStore.open(tmp_path / "f")) == old
    build(tmp_path / "f", random_case, [planted.batch(random_case.items)])
    assert FeatureStore.open(tmp_path / "f").n_items == 60
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_leftovers_of_a_hard_kill_are_cleaned_when_old(random_case, planted, tmp_path):
    old, fresh = tmp_path / ".f.building-old", tmp_path / ".f.building-fresh"
    for leftover in (old, fresh):
        leftover.mkdir()
        (leftover / "tokens.npy").write_bytes(b"x")
    past = time.time() - 7200
    os.utime(old / "tokens.npy", (past, past))
    os.utime(old, (past, past))
    build(tmp_path / "f", random_case, [planted.batch(random_case.items[:4])])
    assert not old.exists()
    assert fresh.exists()


def test_refuses_a_folder_that_holds_something_else(random_case, planted, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "thesis.tex").write_text("years of work")
    with pytest.raises(UnweaveError, match="is not empty and holds no feature store"):
        build(tmp_path / "f", random_case, [planted.batch(random_case.items)])
    assert (tmp_path / "f" / "thesis.tex").read_text() == "years of work"


def test_bad_input_gets_one_clear_error(random_case, planted, tmp_path):
    with pytest.raises(UnweaveError, match="at least one activation row"):
        build(tmp_path / "f", random_case, [])
    with pytest.raises(UnweaveError, match="documents: expected numbers from 0"):
        build(tmp_path / "f", random_case, [planted.batch([(-1, 0, [0], [0])])])
    broken = planted.dictionary(torch.tensor([[float("nan")]]))
    with pytest.raises(UnweaveError, match="NaN or infinite"):
        build_features(tmp_path / "f", broken, [planted.batch([(0, 0, [0], [0])])])
    with pytest.raises(UnweaveError, match=r"unembed|logits"):
        build_features(
            tmp_path / "f", random_case.dictionary, [planted.batch(random_case.items)], unembed=lambda d: d[:1]
        )
    assert list(tmp_path.iterdir()) == []


def test_the_dictionary_is_left_in_the_mode_it_was_in(random_case, planted, tmp_path):
    dictionary = planted.dictionary(random_case.dense)
    dictionary.train()
    build_features(tmp_path / "f", dictionary, [planted.batch(random_case.items)])
    assert dictionary.training
