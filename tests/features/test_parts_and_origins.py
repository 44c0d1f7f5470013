"""Where features lie in rows of several parts, and which text an atom is the row of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from unweave.errors import UnweaveError
from unweave.features import FeatureStore, Origin, build_features, merge

DENSE = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
ITEMS = [(0, 0, [0, 1], [0, 1])]
WORDS = [b"one", b" two"]


class Parts:
    """Adds what a dictionary of two parts has."""

    norms = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]])


def store_of(planted, folder, norms=Parts.norms, items=ITEMS, **options) -> FeatureStore:
    dictionary = planted.dictionary(DENSE)
    dictionary.part_norms = lambda: norms
    return build_features(folder, dictionary, [planted.batch(items)], token_bytes=WORDS, **options)


TWO_MODELS = {
    "site": "layers.1+layers.1",
    "target_site": "layers.1+layers.1",
    "parts": [{"site": "layers.1", "width": 2}] * 2,
    "sources": [{"model": {"name": name}} for name in ("/models/base", "owner/tuned")],
}


def test_shares_and_the_order_by_them(planted, tmp_path) -> None:
    store = store_of(planted, tmp_path / "store", provenance=TWO_MODELS)
    assert store[0].part_shares == [("a", 0.25), ("b", 0.75)]
    assert store[0].relative_norm == 0.75
    assert store[2].part_shares == []
    assert math.isnan(store[2].relative_norm)
    assert store.part_names == {"a": "base, layers.1", "b": "owner/tuned, layers.1"}
    assert [row.index for row in store.list(sort="relative")][:2] == [0, 1]
    assert [row.index for row in store.list(sort="relative", descending=False)][:2] == [1, 0]
    assert store.list(sort="relative")[0].relative == 0.75
    assert "lies in    a 25%  b 75%" in repr(store[0])
    assert "tuned, layers.1" in store[0]._repr_html_()


@pytest.mark.parametrize(
    ("provenance", "labels"),
    [
        ({}, ["0", "1", "2"]),
        ({"site": "x", "parts": [{"site": s, "width": 1} for s in "pqr"]}, ["p", "q", "r"]),
        ({"site": "x", "parts": [{"site": s, "width": 1} for s in "ppr"]}, ["a", "b", "c"]),
        # Targets of their own: what the input is joined of says nothing of them.
        ({"site": "x", "target_site": "y", "parts": [{"site": s, "width": 1} for s in "pqr"]}, ["0", "1", "2"]),
    ],
)
def test_more_than_two_parts_have_shares_and_no_order(planted, tmp_path, provenance, labels) -> None:
    store = store_of(planted, tmp_path / "store", torch.eye(3), provenance=provenance)
    assert [part for part, _ in store[1].part_shares] == labels
    assert store[1].relative_norm is None
    with pytest.raises(UnweaveError, match="cannot sort features by 'relative'"):
        store.list(sort="relative")


def test_an_origin_is_kept_shown_and_found(planted, tmp_path) -> None:
    origins = {1: Origin(4, 7, "a river <b>", " café", "\nfroze")}
    store = store_of(planted, tmp_path / "store", None, origins=origins)
    assert store[1].origin == origins[1]
    assert store[0].origin is None
    assert store.list(sort="index")[1].origin == origins[1]
    assert "is row of  a river <b>» café«↵froze" in repr(store[1])
    assert [row.index for row in store.search("RIVER")] == [1]
    card = store[1]._repr_html_()
    assert "river &amp;lt;b&amp;gt;" in card  # escaped, and once more inside the frame
    assert "document 4, token 7" in card
    assert store[0].part_shares == []


def test_merging_keeps_both(planted, tmp_path) -> None:
    origins = {0: Origin(0, 0, "", "one", " two")}
    stores = [
        store_of(planted, tmp_path / name, items=items, origins=origins, provenance=TWO_MODELS)
        for name, items in (("a", ITEMS), ("b", [(1, 0, [0, 1], [0, 1])]))
    ]
    merged = merge(stores, tmp_path / "merged")
    assert merged[0].origin == origins[0]
    assert np.array_equal(merged.columns["part_norms"], Parts.norms.numpy())
    assert [row.index for row in merged.search("two")] == [row.index for row in stores[0].search("two")]
