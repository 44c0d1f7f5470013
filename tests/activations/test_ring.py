from __future__ import annotations

import json

import pytest
import torch

from unweave.activations import ActivationStore, RowStream, ShuffleRing
from unweave.batch import ActivationBatch, Items
from unweave.errors import UnweaveError
from unweave.files import read_tensors, write_tensors


def make_store(folder, n_documents=200, length=40, target=False) -> ActivationStore:
    """Documents of ``length`` rows one after another; row i holds i (in float64), its target -i."""
    n = n_documents * length
    store = ActivationStore.create(folder, {}, 2, 3 if target else None, "float64", shard_rows=2000)
    for first in range(0, n, 10 * length):
        numbers = torch.arange(first, first + 10 * length).double()
        items = Items(
            tokens=torch.zeros(10 * length, dtype=torch.int32),
            offsets=torch.arange(11) * length,
            document=torch.arange(10) + first // length,
            start=torch.zeros(10, dtype=torch.int32),
        )
        rows = numbers[:, None].repeat(1, 2)
        goal = -numbers[:, None].repeat(1, 3) if target else rows
        store.append(ActivationBatch(rows, goal, items, torch.arange(len(rows))))
    store.finish()
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ActivationStore:
    return make_store(tmp_path_factory.mktemp("ring") / "store")


def rows_of(batch) -> list[int]:
    return batch[0][:, 0].long().tolist()


def test_every_row_of_a_finite_stream_is_given_exactly_once(store):
    ring = ShuffleRing(RowStream(store, epochs_infinite=False), batch_size=96, capacity=1000)
    batches = [rows_of(batch) for batch in ring]
    assert sorted(row for batch in batches for row in batch) == list(range(store.n_rows))
    assert all(len(batch) == 96 for batch in batches[:-12])
    assert len(ring) == 0
    with pytest.raises(UnweaveError, match="ended"):
        ring.next()


def test_an_endless_ring_gives_distinct_rows_and_loses_none(store):
    ring = ShuffleRing(RowStream(store, seed=5), batch_size=64, capacity=500)
    seen: dict[int, int] = {}
    for _ in range(2 * store.n_rows // 64):
        batch = rows_of(ring.next())
        assert len(batch) == 64
        for row in batch:
            seen[row] = seen.get(row, 0) + 1
    held = [int(x) for x in ring.state_dict()["input"][:, 0]]
    for row in held:
        seen[row] = seen.get(row, 0) + 1
    assert set(seen) == set(range(store.n_rows))
    stream = RowStream(store, seed=5)
    n_read = 500 + 64 * (2 * store.n_rows // 64)
    counts = torch.bincount(stream.read(n_read).input[:, 0].long(), minlength=store.n_rows)
    assert [seen[i] for i in range(store.n_rows)] == counts.tolist()


@pytest.mark.parametrize(("batch_size", "capacity"), [(16, 512), (100, 256), (256, 256)])
def test_draws_are_distinct_and_even(store, batch_size, capacity):
    ring = ShuffleRing(RowStream(store), batch_size, capacity, seed=2)
    ring.sample(1)  # fills it
    times = 60_000 // batch_size
    draws = [ring._draw() for _ in range(times)]
    assert all(len(d.unique()) == batch_size for d in draws)
    counts = torch.bincount(torch.cat(draws), minlength=capacity).double()
    mean = times * batch_size / capacity
    chi2 = float(((counts - mean) ** 2 / mean).sum()) / max(1e-9, 1 - batch_size / capacity) if mean else 0
    if batch_size < capacity:
        spread = (2 * capacity) ** 0.5
        assert abs(chi2 - (capacity - 1)) < 5 * spread
    first = torch.stack([d[0] for d in draws]).double()  # the order within a batch is random too
    assert abs(float(first.mean()) - (capacity - 1) / 2) < 5 * capacity / (12 * times) ** 0.5


def test_capacity_is_what_the_data_has(store, fake_source):
    ring = ShuffleRing(RowStream(store), batch_size=64, capacity=100_000)
    ring.next()
    assert len(ring) == ring.stats()["ring_rows"] == store.n_rows
    source = fake_source()
    n = sum(source.batch(i).n_rows for i in range(12))
    live = ShuffleRing(RowStream(source), batch_size=32, capacity=100_000)
    live.next()
    assert len(live) == n
    begun = RowStream(fake_source())
    begun.read(n - 10)  # near the end of an epoch: there is still a whole one to fill from
    ring = ShuffleRing(begun, batch_size=32, capacity=100)
    ring.next()
    assert len(ring) == 100
    with pytest.raises(UnweaveError, match=f"batch_size = 1000 rows, found {n} in all"):
        ShuffleRing(RowStream(fake_source()), batch_size=1000, capacity=2000).next()
    with pytest.raises(UnweaveError, match="batch_size <= capacity"):
        ShuffleRing(RowStream(store), batch_size=65, capacity=64)


def test_targets_stay_with_their_inputs(tmp_path):
    ring = ShuffleRing(RowStream(make_store(tmp_path, target=True)), batch_size=50, capacity=400)
    for _ in range(200):
        inputs, target = ring.next()
        assert torch.equal(target, -inputs[:, :1].expand(-1, 3))
    assert "target" in ring.state_dict()


def test_one_buffer_when_the_target_is_the_input(store):
    ring = ShuffleRing(RowStream(store), batch_size=50, capacity=400)
    inputs, target = ring.next()
    assert target is inputs
    assert "target" not in ring.state_dict()
    before = ring.state_dict()["input"]
    inputs.zero_()
    assert torch.equal(ring.state_dict()["input"], before)


# ---- measured shuffle ----------------------------------------------------------------------------------------------


def brute_force_rate(documents: torch.Tensor) -> float:
    n = len(documents)
    return (int((documents[:, None] == documents[None, :]).sum()) - n) / (n * (n - 1))


def mean_rate(ring: ShuffleRing, batches: int) -> float:
    total = 0.0
    for _ in range(batches):
        inputs, _ = ring.next()
        rate = ring.stats()["same_document_rate"]
        assert rate == pytest.approx(brute_force_rate(inputs[:, 0].long() // 40))
        total += rate
    return total / batches


def test_the_ring_comes_near_a_full_permutation_and_a_bare_stream_does_not(store):
    """Batches of 100 rows, blocks of 50 rows, documents of 40 rows, 8,000 rows in all."""

    def ring_of(capacity: int) -> ShuffleRing:
        return ShuffleRing(RowStream(store, seed=1, block_rows=50), batch_size=100, capacity=capacity, seed=1)

    ring, control = ring_of(4000), ring_of(100)
    mixed, bare = mean_rate(ring, 300), mean_rate(control, 300)
    permuted = ring.stats()["expected_same_document_rate"]
    assert permuted == pytest.approx(39 / 7999)
    generator = torch.Generator().manual_seed(0)
    real = [brute_force_rate(torch.randperm(8000, generator=generator)[:100] // 40) for _ in range(300)]
    assert sum(real) / 300 == pytest.approx(permuted, rel=0.1)
    assert mixed < 1.5 * permuted
    assert bare > 20 * permuted
    assert bare > 20 * mixed


def test_effective_rows_are_measured(store):
    ring = ShuffleRing(RowStream(store), batch_size=50, capacity=1000, seed=3)
    ring.next()
    start = ring.stats()["effective_rows"]
    assert 400 < start < 700  # half the ring: the first fill is as old as if it had streamed in
    for _ in range(200):
        ring.next()
    assert ring.stats()["effective_rows"] == pytest.approx(1000, rel=0.15)
    assert ring.stats()["mean_age"] == pytest.approx(20, rel=0.15)


def test_a_ring_that_draws_from_a_quarter_of_its_slots_is_found_out(store):
    class Lazy(ShuffleRing):
        def _draw(self):
            return torch.randperm(len(self) // 4, generator=self._generator)[: self.batch_size]

    ring = Lazy(RowStream(store), batch_size=50, capacity=1000, seed=3)
    for _ in range(200):
        ring.next()
    assert ring.stats()["ring_rows"] == 1000
    assert ring.stats()["effective_rows"] == pytest.approx(250, rel=0.15)


def test_stats_before_the_first_batch(store):
    stats = ShuffleRing(RowStream(store), batch_size=50, capacity=100).stats()
    assert stats["ring_rows"] == 0
    assert stats["effective_rows"] is None
    assert stats["same_document_rate"] is None


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", [0, 1, 7, 150])
@pytest.mark.parametrize("live", [False, True])
def test_a_resumed_ring_goes_on_bit_for_bit(tmp_path, store, fake_source, drawn, live):
    def make() -> ShuffleRing:
        data = fake_source(d_target=5) if live else ActivationStore.open(store.folder)
        return ShuffleRing(RowStream(data, seed=4), batch_size=32, capacity=256, seed=9)

    ring = make()
    for _ in range(drawn):
        ring.next()
    state = ring.state_dict()
    # Through files, as a checkpoint does it: tensors apart from plain values.
    write_tensors(tmp_path / "t.safetensors", {k: v for k, v in state.items() if isinstance(v, torch.Tensor)})
    plain = json.loads(json.dumps({k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}))
    resumed = make()
    resumed.load_state_dict(plain | read_tensors(tmp_path / "t.safetensors"))
    if drawn:
        assert resumed.stats() == ring.stats()
    for _ in range(100):
        (a, ta), (b, tb) = ring.next(), resumed.next()
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        assert torch.equal(ta, tb)
    assert resumed.stats() == ring.stats()
    again = make()
    again.load_state_dict(state)  # the state was a copy: drawing did not change it
    third = make()
    third.load_state_dict(plain | read_tensors(tmp_path / "t.safetensors"))
    assert torch.equal(again.next()[0], third.next()[0])


def test_a_state_that_does_not_fit_is_refused(store, tmp_path):
    ring = ShuffleRing(RowStream(store), batch_size=32, capacity=256)
    ring.next()
    state = ring.state_dict()
    with pytest.raises(UnweaveError, match="capacity 256, not 300"):
        ShuffleRing(RowStream(store), batch_size=32, capacity=300).load_state_dict(state)
    other = ActivationStore.create(tmp_path, {}, 5, dtype="float64")
    other.append(ActivationBatch.of_rows(torch.zeros(store.n_rows, 5, dtype=torch.float64)))
    other.finish()
    with pytest.raises(UnweaveError, match="2 -> 2 wide"):
        ShuffleRing(RowStream(other), batch_size=32, capacity=256).load_state_dict(state)


def test_seeds_decide_the_batches(store):
    def first(seed):
        return rows_of(ShuffleRing(RowStream(store), batch_size=32, capacity=256, seed=seed).next())

    assert first(1) == first(1)
    assert first(1) != first(2)


def test_peek_shows_held_rows_without_drawing(store):
    ring = ShuffleRing(RowStream(store, seed=1), batch_size=32, capacity=256, seed=1)
    inputs, target = ring.sample(10)[:2]
    assert target is inputs
    assert len(inputs) == 10
    assert set(rows_of((inputs,))) <= {int(x) for x in ring.state_dict()["input"][:, 0]}
    assert len(ring.sample(1000)[0]) == 256
    fresh = ShuffleRing(RowStream(store, seed=1), batch_size=32, capacity=256, seed=1)
    assert rows_of(fresh.next()) == rows_of(ring.next())
    assert "256 of 256 rows" in repr(ring)
