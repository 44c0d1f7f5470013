from __future__ import annotations

import json

import pytest
import torch

from unweave.errors import UnweaveError
from unweave.features import FeatureStore, build_features_of_codes


def test_codes_and_items_cover_every_token(hand_made):
    assert hand_made.codes.shape == (14, 4)
    assert hand_made.codes[0].nnz == 0  # the first token gave no row
    assert hand_made.codes.feature(0).tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 5, 5, 3]
    assert hand_made.items.offsets.tolist() == [0, 7, 10, 14]
    assert hand_made.items.document.tolist() == [5, 5, 9]
    assert hand_made.items.start.tolist() == [0, 7, 0]
    assert hand_made.columns["has_row"].tolist() == [0, *[1] * 13]
    assert len(hand_made) == 4
    assert hand_made.n_rows == 13


def test_top_features_of_an_item(hand_made):
    assert hand_made.top_features(0) == [(1, -4.0), (0, 2.0), (2, 0.25)]
    assert hand_made.top_features(2, n=1) == [(0, 5.0)]
    with pytest.raises(UnweaveError, match="items 0 to 2"):
        hand_made.top_features(3)


def test_indexing(hand_made):
    assert [f.index for f in hand_made[1:3]] == [1, 2]
    assert hand_made[-1].index == 3
    assert [f.index for f in hand_made] == [0, 1, 2, 3]
    with pytest.raises(UnweaveError, match="features 0 to 3"):
        hand_made[4]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [2, 0, 1, 3]),
        ({"descending": False}, [3, 1, 0, 2]),
        ({"sort": "max_value"}, [0, 1, 2, 3]),
        ({"sort": "mean_value"}, [0, 1, 2, 3]),
        ({"sort": "n_items"}, [2, 0, 1, 3]),
        ({"sort": "index", "descending": False}, [0, 1, 2, 3]),
        ({"include_dead": False}, [2, 0, 1]),
        ({"min_density": 2 / 13, "max_density": 0.5}, [0, 1]),
        ({"offset": 1, "limit": 2}, [0, 1]),
        ({"search": "MAT"}, [2, 1]),  # in the snippets of both
        ({"search": " onthe  mat"}, [2, 1]),
        ({"search": "dog"}, [2, 0, 1, 3]),  # the dead feature has it among its logit tokens
        ({"search": "dog", "sort": "index", "descending": False, "max_density": 0.1}, [3]),
        ({"search": "cat cat"}, [0]),
        ({"search": "1"}, [1]),
        ({"search": "#3"}, [3]),
        ({"search": "nowhere"}, []),
        ({"search": " "}, [2, 0, 1, 3]),
    ],
)
def test_list(hand_made, options, wanted):
    page = hand_made.list(**options)
    assert [row.index for row in page] == wanted
    assert page.total == (4 if "offset" in options else len(wanted))


def test_list_refuses_what_it_does_not_know(hand_made):
    with pytest.raises(UnweaveError, match="index, density, max_value, mean_value, n_items"):
        hand_made.list(sort="desnity")
    with pytest.raises(UnweaveError, match="offset and limit"):
        hand_made.list(offset=-1)


def test_summary(hand_made):
    row = hand_made.list()[1]
    assert (row.index, row.n_firing, row.n_items, row.max_value) == (0, 5, 2, 5.0)
    assert row.top_tokens == [" cat"]
    assert row.snippet_tokens == [" cat"] * 4
    assert row.snippet_values == [1, 5, 5, 3]
    assert row.snippet_peak == 1
    dead = hand_made.summary(3)
    assert (dead.snippet, dead.snippet_tokens, dead.density) == (None, [], 0.0)
    assert "» cat«" in repr(hand_made.search("cat"))


def test_open_tells_what_is_wrong(hand_made, tmp_path):
    with pytest.raises(UnweaveError, match="no feature store in"):
        FeatureStore.open(tmp_path / "nowhere")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"format": "unweave.activations/1"}')
    with pytest.raises(UnweaveError, match=r"not of format 'unweave.features/1': found 'unweave.activations/1'"):
        FeatureStore.open(foreign)
    (foreign / "manifest.json").write_text('{"format": "unwea')
    with pytest.raises(UnweaveError, match="not valid JSON"):
        FeatureStore.open(foreign)


@pytest.mark.parametrize("damage", ["cut", "missing", "counts", "flipped", "header"])
def test_damage_is_found(hand_made, damage):
    folder = hand_made.folder
    path = folder / "code_indices.npy"
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-3])
        wanted = "code_indices.npy is cut short"
    elif damage == "missing":
        path.unlink()
        wanted = "code_indices.npy is missing"
    elif damage == "counts":
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["counts"]["n_rows"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        wanted = "manifest of .* is damaged"
    elif damage == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
        wanted = "sha256"
    else:
        data[:6] = b"junk!!"
        path.write_bytes(data)
        wanted = "code_indices.npy is damaged"
    with pytest.raises(UnweaveError, match=wanted):
        store = FeatureStore.open(folder)
        if damage == "header":
            _ = store.codes
        store.verify()


def test_an_undamaged_store_verifies(hand_made):
    FeatureStore.open(hand_made.folder).verify()
    assert "4 features, 3 of them fire, over 13 rows in 3 items" in repr(hand_made)


def test_the_manifest_tells_the_dictionary(hand_made, planted):
    from unweave.features.build import fingerprint

    facts = hand_made.manifest["dictionary"]
    assert facts["arch"] == "planted"
    same = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0, 2.0, 0], [-1.0, 0, 0, 0]])
    assert fingerprint(planted.dictionary(torch.zeros(1, 4), same)) == facts
    assert fingerprint(planted.dictionary(torch.zeros(1, 4), same * 2)) != facts


def test_batches_give_every_item_with_the_codes_of_its_rows(hand_made, monkeypatch):
    monkeypatch.setattr("unweave.features.store._TOKENS", 4)
    batches = list(hand_made.batches())
    assert [len(batch.items) for batch, _ in batches] == [1, 1, 1]
    tokens = torch.cat([batch.items.tokens for batch, _ in batches])
    assert torch.equal(tokens, hand_made.items.tokens)
    assert [len(code) for _, code in batches] == [6, 3, 4]  # the first token has no row
    assert batches[0][0].row_token.tolist() == [1, 2, 3, 4, 5, 6]
    dense = torch.cat([code.dense() for _, code in batches])
    assert torch.equal(dense, hand_made.codes.dense().float()[torch.from_numpy(hand_made.columns["has_row"]).bool()])


def test_built_from_its_own_codes_a_store_says_the_same_of_them(hand_made, content, tmp_path):
    words = [hand_made.vocabulary.bytes_of(i) for i in range(len(hand_made.vocabulary))]
    again = build_features_of_codes(
        tmp_path / "again", hand_made.n_features, hand_made.batches(), token_bytes=words, config=hand_made.config
    )
    for mine, theirs in zip(content(again), content(hand_made)):
        assert mine[:6] == theirs[:6]  # all but what is read off the dictionary
        assert mine[6:] == ([], [])
    assert FeatureStore.merge([again], tmp_path / "merged").n_rows == 13
