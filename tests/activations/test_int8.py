"""int8 rows: what they lose, what they never do, and that every way of reading knows them."""

from __future__ import annotations

import gc

import pytest
import torch

from unweave.activations import ActivationStore, RowStream, ShuffleRing, harvest
from unweave.activations._int8 import dequantise, quantise
from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.files import read_tensors, write_tensors
from unweave.metrics import fvu

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def round_trip(rows: torch.Tensor) -> torch.Tensor:
    return dequantise(*quantise(rows), rows.dtype)


def residual(n: int = 2000, d: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows as residual streams have them: a few channels many times the others."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    rows[:, :2] = rows[:, :2] * 10 + torch.tensor([60.0, -40.0])
    return rows.to(dtype)


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_come_back_within_half_a_step(dtype):
    rows = residual(dtype=dtype)
    values, scale, channel = quantise(rows)
    assert (values.dtype, scale.dtype, channel.dtype) == (torch.int8, torch.float32, torch.float32)
    assert values.abs().max() == 127  # the whole range is used, and -128 never
    back = dequantise(values, scale, channel, torch.float32)
    step = scale[:, None] * channel
    assert ((back - rows.float()).abs() <= 0.501 * step).all()
    assert round_trip(rows).dtype == dtype
    assert fvu(rows.float(), round_trip(rows).float()) < 6e-4


def test_the_channel_scale_is_worth_its_four_bytes():
    rows = residual().float()
    alone = rows.abs().amax(1, keepdim=True) / 127
    assert fvu(rows, (rows / alone).round() * alone) > 5 * fvu(rows, round_trip(rows))


def test_zero_rows_zero_channels_and_nothing_at_all():
    rows = residual(10, 8)
    rows[3] = 0
    rows[:, 5] = 0
    back = round_trip(rows)
    assert (back[3] == 0).all()
    assert (back[:, 5] == 0).all()
    assert torch.isfinite(back).all()
    assert (round_trip(torch.zeros(4, 3)) == 0).all()
    assert round_trip(torch.zeros(0, 3)).shape == (0, 3)


def test_an_outlier_row_spoils_no_other():
    rows = residual(dtype=torch.float32)
    before = fvu(rows, round_trip(rows))
    wild = rows.clone()
    wild[7] = torch.randn(64, generator=torch.Generator().manual_seed(1)) * 1e30
    back = round_trip(wild)
    rest = torch.arange(len(rows)) != 7
    assert fvu(rows[rest], back[rest]) < 1.2 * before
    assert fvu(wild[7:8].double().T, back[7:8].double().T) < 0.01


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_and_smallest_numbers_stay_finite(dtype):
    info = torch.finfo(dtype)
    rows = residual(500, 32, torch.float32)
    rows[0] = info.max * torch.linspace(-1, 1, 32)
    rows[1] = info.max
    rows[2] = info.smallest_normal
    rows[3] = info.tiny * 2.0**-4
    rows = rows.to(dtype)
    back = round_trip(rows)
    assert torch.isfinite(back).all()
    assert float((back[1].double() / info.max - 1).abs().max()) < 0.1
    assert float((back[0].double() - rows[0].double()).norm() / rows[0].double().norm()) < 0.1
    assert (back[2].double() / info.smallest_normal <= 1.1).all()


def test_equal_rows_give_equal_bits_for_any_number_of_threads():
    rows, before = residual(9000), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(quantise(rows))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---- stores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d_target", [None, 5])
def test_every_way_of_reading_gives_the_same_rows(tmp_path, fake_source, dtype, d_target):
    source = fake_source(dtype=dtype, d_target=d_target, d=16)
    store = harvest(source, tmp_path / "int8", n_rows=300, shard_rows=100, dtype="int8")
    plain = harvest(source, tmp_path / "plain", n_rows=300, shard_rows=100)
    store.verify(progress=False)
    rows, n = store.rows(slice(None)), store.n_rows
    assert (store.dtype, rows.dtype, n) == (dtype, dtype, plain.n_rows)
    assert 0 < fvu(plain.rows(slice(None)).float(), rows.float()) < 1e-3
    border = store.shard_sizes[0]
    for which in (slice(border - 5, border + 7), slice(0, n, 7), [3, border, 1, 3, -1]):
        assert torch.equal(store.rows(which), rows[which])
    assert torch.equal(store[border - 5 : border + 7].input, rows[border - 5 : border + 7])
    assert torch.equal(torch.cat([b.input for b in store.batches()]), rows)
    stream = RowStream(store, block_rows=64, epochs_infinite=False).read(n)
    assert stream.input.dtype == dtype
    assert torch.equal(stream.input.float().sort(0).values, rows.float().sort(0).values)
    inputs, target = ShuffleRing(RowStream(store), 32, 100).next()
    assert inputs.dtype == target.dtype == dtype
    assert (target is inputs) == (d_target is None)
    targets = store.targets(slice(None))
    if d_target:
        assert tuple(targets.shape) == (n, 5)
        assert fvu(plain.targets(slice(None)).float(), targets.float()) < 1e-3
        assert torch.equal(torch.cat([b.target for b in store.batches()]), targets)
    assert torch.equal(store.meta(slice(None)).document, plain.meta(slice(None)).document)
    assert store.same_document_rate() == plain.same_document_rate()


def test_half_the_bytes(tmp_path):
    rows = residual(4000, 256)
    for dtype in ("bfloat16", "int8"):
        store = ActivationStore.create(tmp_path / dtype, {}, 256, dtype=dtype)
        store.append(ActivationBatch.of_rows(rows))
        store.finish()
    int8, plain = (ActivationStore.open(tmp_path / dtype).bytes for dtype in ("int8", "bfloat16"))
    assert int8 < plain - 4000 * 251  # 256 bytes a row less, 4 for the scale, and the channels' scales


def test_what_the_store_says_of_itself(tmp_path, fake_source):
    store = harvest(fake_source(), tmp_path, n_rows=100, dtype="int8")
    assert "int8 read as bfloat16" in repr(store)
    assert "int8 read as bfloat16" in dict(store.describe())["rows"]
    assert store.provenance["stored"] == "int8"  # other rows than the source's own: trainings must not mix them
    assert (store.manifest.dtype, store.manifest.rows_dtype) == ("int8", "bfloat16")


def test_appended_and_resumed(tmp_path, fake_source, contents):
    whole = harvest(fake_source(), tmp_path / "whole", n_rows=400, shard_rows=100, dtype="int8")
    harvest(fake_source(), tmp_path / "parts", n_rows=150, shard_rows=100, dtype="int8")
    grown = harvest(fake_source(), tmp_path / "parts", n_rows=whole.n_rows, dtype="int8")
    assert grown.n_rows == whole.n_rows

    def stop(i: int) -> None:
        if i == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(fake_source(before=stop), tmp_path / "cut", n_rows=400, shard_rows=100, dtype="int8")
    harvest(fake_source(), tmp_path / "cut", n_rows=400, dtype="int8")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    (tmp_path / "cut" / "shard-00001.safetensors").unlink()
    harvest(fake_source(), tmp_path / "cut", n_rows=400, dtype="int8")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_one_folder_is_of_one_kind(tmp_path, fake_source):
    harvest(fake_source(), tmp_path / "int8", n_rows=100, dtype="int8")
    harvest(fake_source(), tmp_path / "plain", n_rows=100)
    with pytest.raises(UnweaveError, match='stored: expected nothing, found "int8"'):
        harvest(fake_source(), tmp_path / "int8", n_rows=200)
    with pytest.raises(UnweaveError, match='stored: expected "int8", found nothing'):
        harvest(fake_source(), tmp_path / "plain", n_rows=200, dtype="int8")


def test_rows_it_cannot_keep_are_refused(tmp_path, fake_source):
    with pytest.raises(UnweaveError, match="batch 7 hold NaN or infinity"):
        harvest(fake_source(poison=(7, 2)), tmp_path / "nan", n_rows=400, shard_rows=100, dtype="int8")
    with pytest.raises(UnweaveError, match="float64 rows: store them as they are"):
        harvest(fake_source(dtype=torch.float64), tmp_path / "f64", n_rows=100, dtype="int8")
    store = ActivationStore.create(tmp_path / "bf16", {}, 8, dtype="int8")
    with pytest.raises(UnweaveError, match=r"expected bfloat16 rows, found float32.*it was given"):
        store.append(fake_source(dtype=torch.float32).batch(0))
    with pytest.raises(UnweaveError, match="only int8"):
        ActivationStore.create(tmp_path / "x", {}, 8, dtype="float32", rows_dtype="bfloat16")
    with pytest.raises(UnweaveError, match="dtype is 'int8', or None"):
        harvest(fake_source(), tmp_path / "x", n_rows=10, dtype="int4")


def test_a_shard_made_wrong_is_found(tmp_path, fake_source):
    store = harvest(fake_source(), tmp_path, n_rows=100, dtype="int8")
    path = tmp_path / "shard-00000.safetensors"
    tensors = read_tensors(path)
    store._pool.clear()
    gc.collect()
    tensors["input.scale"] = tensors["input.scale"].clone()
    tensors["input.scale"][3] = float("nan")
    write_tensors(path, tensors, {"format": "unweave.activations/1"})
    reader = ActivationStore(tmp_path, store.manifest).shard(0)
    with pytest.raises(UnweaveError, match="rows and scales do not fit"):
        reader.check_contents()
    del tensors["input.channel"]
    write_tensors(path, tensors, {"format": "unweave.activations/1"})
    with pytest.raises(UnweaveError, match=r"'input.channel': expected F32 \(8,\) from the manifest, found nothing"):
        ActivationStore(tmp_path, store.manifest).shard(0)
