from __future__ import annotations

import gc
import json
import os

import pytest
import torch

from unweave.activations import ActivationStore, _shard
from unweave.batch import ActivationBatch, Items
from unweave.errors import UnweaveError


def fill(folder, source, shard_rows=100) -> ActivationStore:
    store = ActivationStore.create(
        folder, source.provenance, source.d, source.d_target, source.dtype, shard_rows=shard_rows
    )
    for batch in source.batches():
        store.append(batch)
    store.finish()
    return ActivationStore.open(folder)


@pytest.fixture
def store(tmp_path, fake_source) -> ActivationStore:
    return fill(tmp_path / "store", fake_source())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("d_target", [None, 5])
def test_batches_come_back_bit_for_bit(tmp_path, fake_source, same_batch, dtype, d_target):
    source = fake_source(dtype=dtype, d_target=d_target)
    store = fill(tmp_path, source)
    assert store.n_shards > 2
    read = list(store.batches())
    assert len(read) == store.n_batches == source.n_batches
    assert all(same_batch(a, source.batch(i)) for i, a in enumerate(read))
    assert (store.d_in, store.d_out, store.dtype, store.complete) == (8, d_target or 8, dtype, True)
    for skip in (1, 3, 4, 11, 12, 50):
        later = list(store.batches(skip))
        assert len(later) == max(0, 12 - skip)
        assert all(same_batch(a, source.batch(skip + i)) for i, a in enumerate(later))


def test_counts_rows_meta_and_items_across_shard_borders(store, fake_source):
    batches = [fake_source().batch(i) for i in range(12)]
    rows = torch.cat([b.input for b in batches])
    documents = torch.cat([b.meta.document for b in batches])
    positions = torch.cat([b.meta.position for b in batches])
    tokens = torch.cat([b.meta.token for b in batches])
    items = Items.concatenate([b.items for b in batches])
    assert len(store) == store.n_rows == len(rows)
    assert (store.n_items, store.n_tokens) == (len(items), items.n_tokens)
    assert torch.equal(store.rows(slice(None)), rows)
    border = store.shard_sizes[0]
    for which in (
        slice(border - 5, border + 7),
        slice(-3, None),
        slice(5, 2),
        slice(0, len(rows), 7),
        [3, border, 1, 3, -1],
    ):
        assert torch.equal(store.rows(which), rows[which])
        meta = store.meta(which)
        assert torch.equal(meta.document, documents[which])
        assert torch.equal(meta.position, positions[which])
        assert torch.equal(meta.token, tokens[which])
    assert torch.equal(store.items.tokens, items.tokens)
    assert torch.equal(store.items.offsets, items.offsets)
    assert torch.equal(store.items.document, items.document)


def test_a_slice_is_a_batch_with_whole_items(store):
    border = store.shard_sizes[0]
    part = store[border - 5 : border + 7]
    assert torch.equal(part.input, store.rows(slice(border - 5, border + 7)))
    assert part.target is part.input
    whole = store.meta(slice(border - 5, border + 7))
    assert torch.equal(part.meta.document, whole.document)
    assert torch.equal(part.meta.position, whole.position)
    assert torch.equal(part.meta.token, whole.token)
    lengths = store.items.offsets.diff().tolist()
    assert all(n in lengths for n in part.items.offsets.diff().tolist())
    assert len(store[5:5].input) == 0
    assert torch.equal(store[-1].input, store.rows([len(store) - 1]))
    for wrong in (lambda: store[len(store)], lambda: store.rows([len(store)]), lambda: store.rows([-len(store) - 1])):
        with pytest.raises(UnweaveError, match="outside the store"):
            wrong()
    with pytest.raises(UnweaveError, match=r"rows\(indices\)"):
        store[::2]
    with pytest.raises(UnweaveError, match="row numbers"):
        store.rows(torch.ones(len(store), dtype=torch.bool))
    with pytest.raises(TypeError):
        iter(store)


def test_separate_targets_are_read_by_row(tmp_path, fake_source):
    source = fake_source(d_target=5)
    store = fill(tmp_path, source)
    targets = torch.cat([source.batch(i).target for i in range(12)])
    assert torch.equal(store.targets(slice(90, 250)), targets[90:250])
    assert torch.equal(store.targets([200, 4]), targets[[200, 4]])
    assert torch.equal(store[90:250].target, targets[90:250])


def test_a_tied_batch_may_enter_a_store_with_targets(tmp_path, fake_source):
    store = ActivationStore.create(tmp_path, {}, 8, 8)
    batch = fake_source().batch(0)
    store.append(batch)
    store.finish()
    assert torch.equal(next(store.batches()).target, batch.input)


def test_what_is_handed_out_is_a_copy(store):
    before = store.rows(slice(None))
    next(store.batches()).input.zero_()
    next(store.batches()).items.tokens.zero_()
    store[0:50].input.zero_()
    store.rows(slice(0, 50)).zero_()
    assert torch.equal(store.rows(slice(None)), before)
    store.verify(progress=False)


def test_a_source_may_reuse_its_buffer(tmp_path):
    store = ActivationStore.create(tmp_path, {}, 4, dtype="float32")
    buffer = torch.empty(10, 4)
    for i in range(3):
        store.append(ActivationBatch.of_rows(buffer.fill_(i), first=10 * i))
    store.finish()
    assert store.rows([0, 10, 20])[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_rows_pending_are_lost_without_flush_and_finished_ones_are_not(tmp_path, fake_source):
    source = fake_source()
    store = ActivationStore.create(tmp_path, source.provenance, 8, shard_rows=1000)
    store.append(source.batch(0))
    store.flush()
    store.append(source.batch(1))
    assert store.n_pending_rows == source.batch(1).n_rows
    assert "pending" in repr(store)
    again = ActivationStore.open(tmp_path)
    assert (again.n_batches, again.n_rows, again.complete) == (1, source.batch(0).n_rows, False)
    again.append(source.batch(1))
    again.finish()
    assert ActivationStore.open(tmp_path).n_batches == 2
    again.append(source.batch(2))
    again.flush()
    assert not ActivationStore.open(tmp_path).complete


def test_many_shards_keep_few_mappings_open(tmp_path, fake_source, monkeypatch):
    monkeypatch.setattr(_shard, "_OPEN_SHARDS", 3)
    store = fill(tmp_path, fake_source(n_batches=40), shard_rows=1)
    assert store.n_shards >= 38
    gc.collect()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(2):
        assert len(list(store.batches())) == 40
    assert len(store._pool) == 3
    if files:
        assert len(os.listdir("/proc/self/fd")) == files
        with open("/proc/self/maps") as maps:
            assert len({line.split()[-1] for line in maps if str(tmp_path) in line}) <= 4


def test_nan_is_refused_naming_where(tmp_path, fake_source):
    source = fake_source(poison=(5, 10))
    store = ActivationStore.create(tmp_path, source.provenance, 8, shard_rows=100)
    with pytest.raises(UnweaveError) as error:
        for batch in source.batches():
            store.append(batch)
    bad = source.batch(5)
    item = 20 + int(bad.items.item_of_token[bad.row_token[10]])
    expected = f"item {item}, document {int(bad.meta.document[10])}, position {int(bad.meta.position[10])}"
    assert expected in str(error.value)
    assert "1 of" in str(error.value)
    assert "batch 5" in str(error.value)
    finished = ActivationStore.open(tmp_path)
    finished.verify(progress=False)
    assert 0 < finished.n_batches <= 5


def test_large_finite_values_are_not_taken_for_infinity(tmp_path):
    rows = torch.full((10, 4), 60000.0, dtype=torch.float16)
    store = ActivationStore.create(tmp_path, {}, 4, dtype="float16")
    store.append(ActivationBatch.of_rows(rows))
    store.finish()
    assert torch.equal(store.rows(slice(None)), rows)


def test_batches_that_do_not_fit_are_refused(tmp_path, fake_source):
    store = ActivationStore.create(tmp_path, {}, 8, shard_rows=100)
    good = fake_source().batch(0)
    cases = {
        r"expected shape \(\d+, 8\)": fake_source(d=9).batch(0),
        "expected bfloat16 rows, found float32": fake_source(dtype=torch.float32).batch(0),
        "without one": ActivationBatch(good.input, good.input.clone(), good.items, good.row_token),
        "do not fit": ActivationBatch(good.input, good.input, good.items, good.row_token.flip(0)),
        "do not fit its items": ActivationBatch(good.input, good.input, good.items[0:1], good.row_token),
    }
    for message, batch in cases.items():
        with pytest.raises(UnweaveError, match=message):
            store.append(batch)
    assert store.n_pending_rows == 0
    with pytest.raises(UnweaveError, match="stored as one of"):
        ActivationStore.create(tmp_path / "other", {}, 8, dtype="int4")
    with pytest.raises(UnweaveError, match="plain JSON"):
        ActivationStore.create(tmp_path / "other", {"x": object()}, 8)


# ---- broken folders ------------------------------------------------------------------------------------------------


def test_folders_that_are_no_store(tmp_path, store):
    with pytest.raises(UnweaveError, match="no activation store"):
        ActivationStore.open(tmp_path / "nowhere")
    with pytest.raises(UnweaveError, match="already holds"):
        ActivationStore.create(store.folder, {}, 8)
    (store.folder / "manifest.json").rename(store.folder / "elsewhere.json")
    with pytest.raises(UnweaveError, match=r"shards but no manifest\.json"):
        ActivationStore.create(store.folder, {}, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "unweave.activations/9"}, "expected format 'unweave.activations/1', found"),
        ({"n_rows": 1}, "n_rows is 1, but its shards add up to"),
        ({"d_in": -8}, "d_in"),
        ({"dtype": "object"}, "dtype"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_a_manifest_that_lies_is_refused(store, change, message):
    path = store.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnweaveError, match=message):
        ActivationStore.open(store.folder)


def test_a_manifest_cannot_point_outside_its_folder(store):
    path = store.folder / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][1]["file"] = "../../secret.safetensors"
    path.write_text(json.dumps(values))
    with pytest.raises(UnweaveError, match=r"must be called 'shard-00001\.safetensors'"):
        ActivationStore.open(store.folder)
    path.write_text(json.dumps(values)[:-40])
    with pytest.raises(UnweaveError, match="not valid JSON"):
        ActivationStore.open(store.folder)


@pytest.mark.parametrize("place", [3, 20, 0.5, -1])
def test_a_flipped_byte_is_found_and_named(store, place):
    store.verify(progress=False)
    path = store.folder / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    place = int(place * len(data)) if isinstance(place, float) else place
    data[place] ^= 1
    path.write_bytes(data)
    opened = ActivationStore.open(store.folder)
    with pytest.raises(UnweaveError, match=r"shard-00002\.safetensors is damaged.*run the same harvest again"):
        opened.verify(progress=False)


def test_missing_and_cut_shards_are_found_at_open(store):
    path = store.folder / "shard-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    for check in (lambda: ActivationStore.open(store.folder), lambda: store.verify(progress=False)):
        with pytest.raises(UnweaveError, match=rf"shard-00001.*expected {len(data):,} bytes, found {len(data) - 1:,}"):
            check()
    path.unlink()
    with pytest.raises(UnweaveError, match=r"shard-00001.*missing"):
        ActivationStore.open(store.folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"row_token"', b'"row_tokem"', r"tensor 'row_tokem': expected nothing from the manifest, found I64"),
        (b'"dtype":"BF16"', b'"dtype":"F16" ', r"tensor 'input': expected BF16 .* from the manifest, found F16"),
        (b'{"', b'["', "not a whole safetensors file"),
    ],
)
def test_a_header_the_manifest_does_not_promise_is_refused_when_read(store, old, new, message):
    path = store.folder / "shard-00000.safetensors"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))  # as long as before, so open() finds nothing
    with pytest.raises(UnweaveError, match=message):
        next(ActivationStore.open(store.folder).batches())


def test_a_shard_whose_parts_contradict_each_other_fails_verify(tmp_path, fake_source):
    store = fill(tmp_path, fake_source())
    from safetensors.torch import load_file, save_file

    from unweave.files import sha256_file

    path = tmp_path / "shard-00000.safetensors"
    tensors = load_file(path)
    tensors["item_offsets"][2] += 1000
    save_file(tensors, path, {"format": "unweave.activations/1"})
    values = json.loads((tmp_path / "manifest.json").read_text())
    values["shards"][0]["sha256"] = sha256_file(path)
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    del store
    with pytest.raises(UnweaveError, match="do not fit together"):
        ActivationStore.open(tmp_path).verify(progress=False)


# ---- words ---------------------------------------------------------------------------------------------------------


def test_verify_against_says_what_differs(store, fake_source):
    store.verify_against(fake_source().provenance, d_in=8, d_out=8)
    with pytest.raises(UnweaveError, match="d_in: expected 16, found 8"):
        store.verify_against(d_in=16)
    with pytest.raises(UnweaveError, match=r'model.name: expected "other", found "fake"'):
        store.verify_against(fake_source(name="other").provenance)
    with pytest.raises(UnweaveError, match=r"site: expected nothing, found"):
        store.verify_against({k: v for k, v in fake_source().provenance.items() if k != "site"})


def test_repr_and_describe(tmp_path, fake_source):
    store = fill(tmp_path, fake_source(name="<b>bold</b>"))
    text = repr(store)
    assert f"{store.n_rows:,} rows x 8 bfloat16" in text
    assert "complete" in text
    assert "layers.2" in text
    facts = dict(store.describe())
    assert facts["contexts"] == "48 in 12 batches"
    assert facts["model"] == "name <b>bold</b>, revision r1"
    assert f"{store.n_tokens - store.n_rows} without a row" in facts["tokens"]
    assert "<b>" not in store._repr_html_()


def test_same_document_rate_counts_pairs(store):
    documents = store.meta(slice(None)).document
    same = documents[:, None] == documents[None, :]
    n = len(documents)
    assert store.same_document_rate() == pytest.approx((int(same.sum()) - n) / (n * (n - 1)), rel=1e-12)
