from __future__ import annotations

import json

import pytest
import torch

from unweave.activations import ActivationStore, RowStream, harvest
from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError


def numbered_store(folder, n=1000, shard_rows=300, batch=90, target=False) -> ActivationStore:
    """Row i holds i in every column and belongs to document i // 10; its target is -i."""
    store = ActivationStore.create(folder, {}, 3, 2 if target else None, "float32", shard_rows=shard_rows)
    for first in range(0, n, batch):
        numbers = torch.arange(first, min(first + batch, n)).float()
        rows = numbers[:, None].expand(-1, 3)
        made = ActivationBatch.of_rows(rows, -numbers[:, None].expand(-1, 2) if target else None, first)
        made.items.document.div_(10, rounding_mode="floor")
        store.append(made)
    store.finish()
    return store


def read_all(stream: RowStream, n: int, step: int) -> torch.Tensor:
    return torch.cat([stream.read(min(step, n - i)).input[:, 0] for i in range(0, n, step)]).long()


def test_every_row_once_an_epoch_in_another_order_each_time(tmp_path):
    store = numbered_store(tmp_path)
    stream = RowStream(store, seed=1, block_rows=64)
    epochs = [read_all(stream, 1000, 77) for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(1000))
    other = read_all(RowStream(store, seed=2, block_rows=64), 1000, 77)
    orders = [tuple(e.tolist()) for e in (*epochs, other)]
    assert len(set(orders)) == 4
    assert orders[0] == tuple(read_all(RowStream(store, seed=1, block_rows=64), 1000, 1000).tolist())


def test_blocks_are_consecutive_rows_of_one_shard_and_shuffled(tmp_path):
    store = numbered_store(tmp_path)
    order = read_all(RowStream(store, seed=1, block_rows=64), 1000, 1000)
    starts = order[torch.cat([torch.tensor([True]), order.diff() != 1])].tolist()
    borders = torch.tensor([0, *store.shard_sizes]).cumsum(0).tolist()
    possible = {b + i for b, size in zip(borders, store.shard_sizes) for i in range(0, size, 64)}
    assert set(starts) <= possible
    assert len(starts) > len(possible) * 0.7  # two blocks may meet by chance
    assert starts != sorted(starts)


def test_each_row_comes_with_its_document_and_target(tmp_path):
    stream = RowStream(numbered_store(tmp_path, target=True), block_rows=50)
    for n in (1, 49, 300, 700):
        chunk = stream.read(n)
        assert torch.equal(chunk.document, chunk.input[:, 0].long() // 10)
        assert torch.equal(chunk.target, -chunk.input[:, :2])
    tied = RowStream(numbered_store(tmp_path / "tied")).read(600)
    assert tied.target is tied.input


@pytest.mark.parametrize("read_before", [0, 1, 63, 64, 500, 999, 1000, 1001, 2345])
def test_state_over_a_store_is_exact_and_small(tmp_path, read_before):
    store = numbered_store(tmp_path)
    stream = RowStream(store, seed=3, block_rows=64)
    stream.read(read_before)
    state = json.loads(json.dumps(stream.state_dict()))
    assert len(json.dumps(state)) < 200
    resumed = RowStream(ActivationStore.open(tmp_path), seed=3, block_rows=64)
    resumed.load_state_dict(state)
    for n in (5, 100, 1500):
        a, b = stream.read(n), resumed.read(n)
        assert torch.equal(a.input, b.input)
        assert torch.equal(a.document, b.document)
    assert stream.state_dict() == resumed.state_dict()


def test_a_state_of_other_settings_is_refused(tmp_path):
    store = numbered_store(tmp_path)
    state = RowStream(store, seed=3).state_dict()
    with pytest.raises(UnweaveError, match="seed 3, this stream has 4"):
        RowStream(store, seed=4).load_state_dict(state)
    with pytest.raises(UnweaveError, match="block_rows 256, this stream has 100"):
        RowStream(store, seed=3, block_rows=100).load_state_dict(state)
    store.append(ActivationBatch.of_rows(torch.zeros(5, 3)))
    store.finish()
    with pytest.raises(UnweaveError, match="n_rows 1000, this stream has 1005"):
        RowStream(store, seed=3).load_state_dict(state)


def test_a_stream_keeps_to_the_rows_it_began_with_while_the_store_grows(tmp_path):
    store = numbered_store(tmp_path)
    stream = RowStream(store, seed=1)
    first = stream.read(10).input[:, 0]
    store.append(ActivationBatch.of_rows(torch.zeros(500, 3)))
    store.finish()
    rest = stream.read(990).input[:, 0]
    assert torch.equal(torch.cat([first, rest]).sort().values, torch.arange(1000).float())


def test_a_stream_of_one_epoch_ends(tmp_path):
    stream = RowStream(numbered_store(tmp_path), epochs_infinite=False)
    assert len(stream.read(900).input) == 900
    assert len(stream.read(900).input) == 100
    last = stream.read(10)
    assert stream.ended
    assert tuple(last.input.shape) == (0, 3)
    assert tuple(last.document.shape) == (0,)


def test_a_chunk_can_stop_where_an_epoch_ends(tmp_path):
    stream = RowStream(numbered_store(tmp_path))
    stream.read(700)
    assert [len(stream.read(400, cross_epochs=False).input) for _ in range(4)] == [300, 400, 400, 200]


def test_a_source_is_read_in_its_order_again_and_again(fake_source):
    source = fake_source()
    rows = torch.cat([source.batch(i).input for i in range(12)])
    documents = torch.cat([source.batch(i).meta.document for i in range(12)])
    stream = RowStream(source)
    chunks = [stream.read(100) for _ in range(10)]
    got = torch.cat([c.input for c in chunks])
    assert torch.equal(got, rows.repeat(3, 1)[: len(got)])
    assert torch.equal(torch.cat([c.document for c in chunks]), documents.repeat(3)[: len(got)])
    assert stream.epoch == len(got) // len(rows)


@pytest.mark.parametrize("read_before", [0, 10, 200, 457, 1300])
def test_state_over_a_source_runs_the_model_only_from_there(fake_source, read_before):
    before = fake_source(d_target=5)
    stream = RowStream(before)
    stream.read(read_before)
    state = json.loads(json.dumps(stream.state_dict()))
    again = fake_source(d_target=5)
    resumed = RowStream(again)
    resumed.load_state_dict(state)
    a, b = stream.read(50), resumed.read(50)
    assert torch.equal(a.input, b.input)
    assert torch.equal(a.target, b.target)
    assert again.ran[0] == state["piece"] % 12
    assert len(again.ran) <= 3


def test_data_without_rows_is_refused(tmp_path, fake_source):
    with pytest.raises(UnweaveError, match="holds no rows"):
        RowStream(ActivationStore.create(tmp_path, {}, 3))
    with pytest.raises(UnweaveError, match="gave no rows"):
        RowStream(fake_source(n_batches=0)).read(1)
    empty = fake_source(n_batches=2)
    make = empty.batch
    empty.batch = lambda i: make(3)  # batches there are, rows there are none
    with pytest.raises(UnweaveError, match="gave no rows"):
        RowStream(empty).read(1)


def test_what_is_read_is_a_copy(tmp_path, fake_source):
    store = harvest(fake_source(), tmp_path, n_rows=300, shard_rows=100)
    RowStream(store, seed=1).read(store.n_rows).input.zero_()
    RowStream(store, seed=1).read(20).input.zero_()
    assert RowStream(store, seed=1).read(store.n_rows).input.abs().sum() > 0
    store.verify(progress=False)
    assert "epoch 0" in repr(RowStream(store))
