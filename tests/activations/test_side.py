"""Side inputs: stored, read, mixed and resumed with their rows; and nothing of them where there are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unweave.activations import ActivationStore, RowStream, ShuffleRing, harvest
from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.files import read_tensors, write_tensors
from unweave.sources import ArraySource
from unweave.sources._base import Source


@pytest.fixture(scope="session")
def with_side(fake_source) -> Callable[..., Source]:
    """The source of the other tests, its side inputs made of its rows so that they can be told to belong together."""

    class WithSide(fake_source):
        @property
        def d_side(self) -> int:
            return 3

        def batch(self, i: int) -> ActivationBatch:
            plain = super().batch(i)
            return replace(plain, side=side_of(plain.input))

    return WithSide


def side_of(rows: torch.Tensor) -> torch.Tensor:
    return rows[:, :3].float() * 0.3 + 1


def test_a_store_gives_back_what_it_was_given(tmp_path, with_side, same_batch):
    source = with_side(d_target=5)
    store = harvest(source, tmp_path, n_rows=300, shard_rows=100)
    store.verify(progress=False)
    assert (store.d_side, store.side_dtype) == (3, torch.float32)
    for found, given in zip(store.batches(), source.batches()):
        assert same_batch(found, given)
        assert torch.equal(found.side, given.side)
    every = store.sides(slice(None))
    assert torch.equal(every, side_of(store.rows(slice(None))))
    assert torch.equal(store.sides([250, 3, 111]), every[[250, 3, 111]])
    assert torch.equal(store[90:130].side, every[90:130])
    assert store[5:5].side.shape == (0, 3)
    assert "(+ 3 side)" in repr(store)
    assert ("side", "width 3, float32") in store.describe()
    assert ActivationStore.open(tmp_path).manifest == store.manifest


def test_int8_rows_leave_side_inputs_as_they_are(tmp_path, with_side):
    store = harvest(with_side(), tmp_path, n_rows=300, dtype="int8", shard_rows=100)
    exact = torch.cat([batch.side for batch in with_side().batches()])
    assert torch.equal(store.sides(slice(None)), exact[: store.n_rows])
    assert not torch.equal(store.sides(slice(None)), side_of(store.rows(slice(None))))


def test_the_format_says_so_and_only_then(tmp_path, fake_source, with_side):
    plain = harvest(fake_source(), tmp_path / "plain", n_rows=300)
    manifest = json.loads((plain.folder / "manifest.json").read_text())
    assert manifest["format"] == "unweave.activations/1"
    assert not {"d_side", "side_dtype"} & manifest.keys()
    assert plain.sides([1]) is None
    store = harvest(with_side(), tmp_path / "side", n_rows=300)
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["format"] == "unweave.activations/2"
    path.write_text(json.dumps(manifest | {"format": "unweave.activations/1"}))
    with pytest.raises(UnweaveError, match="d_side and side_dtype go together"):
        ActivationStore.open(store.folder)
    path.write_text(json.dumps(manifest | {"d_side": 4}))
    with pytest.raises(UnweaveError, match=r"tensor 'side': expected F32 \(\d+, 4\) from the manifest, found F32"):
        ActivationStore.open(store.folder).rows([0])


def test_the_page_on_the_format_names_them(tmp_path, with_side):
    from safetensors.torch import load_file

    store = harvest(with_side(), tmp_path, n_rows=300)
    page = (Path(__file__).parents[2] / "docs" / "activation-store.md").read_text(encoding="utf-8")
    names = [
        *json.loads((store.folder / "manifest.json").read_text()),
        *load_file(tmp_path / "shard-00000.safetensors"),
    ]
    assert all(f"`{name}`" in page for name in names)


def test_batches_that_do_not_fit_are_refused(tmp_path, fake_source, with_side):
    plain, sided = fake_source().batch(0), with_side().batch(0)
    store = ActivationStore.create(tmp_path / "a", {}, 8)
    with pytest.raises(UnweaveError, match=r"batch.side: expected none, found float32 side inputs of shape"):
        store.append(sided)
    store = ActivationStore.create(tmp_path / "b", {}, 8, d_side=3, side_dtype="float32")
    with pytest.raises(UnweaveError, match=r"batch.side: expected float32 side inputs of shape .* found none"):
        store.append(plain)
    with pytest.raises(UnweaveError, match=r"expected float32 side inputs .* found bfloat16"):
        store.append(replace(sided, side=sided.side.bfloat16()))
    with pytest.raises(UnweaveError, match=r"of .* side rows of batch 0 hold NaN"):
        store.append(replace(sided, side=sided.side / 0))


@pytest.mark.parametrize("read_ahead", [False, True])
@pytest.mark.parametrize("live", [False, True])
def test_the_ring_keeps_them_with_their_rows_and_resumes(tmp_path, with_side, live, read_ahead):
    harvest(with_side(), tmp_path / "store", n_rows=300, shard_rows=100)

    def make() -> ShuffleRing:
        data = with_side() if live else ActivationStore.open(tmp_path / "store")
        return ShuffleRing(RowStream(data, seed=4, read_ahead=read_ahead, block_rows=16), 32, 128, seed=9)

    ring = make()
    for _ in range(40):
        drawn = ring.draw()
        assert torch.equal(drawn.side, side_of(drawn.input))
    assert torch.equal(ring.sample(50).side, side_of(ring.sample(50).input))
    state = ring.state_dict()
    write_tensors(tmp_path / "t.safetensors", {k: v for k, v in state.items() if isinstance(v, torch.Tensor)})
    plain = json.loads(json.dumps({k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}))
    resumed = make()
    resumed.load_state_dict(plain | read_tensors(tmp_path / "t.safetensors"))
    for _ in range(40):
        a, b = ring.draw(), resumed.draw()
        assert torch.equal(a.input, b.input)
        assert torch.equal(a.side, b.side)


def test_a_state_without_them_is_refused(tmp_path, fake_source, with_side):
    ring = ShuffleRing(RowStream(fake_source()), 32, 128)
    ring.next()
    with pytest.raises(UnweaveError, match="saved side inputs are 0 wide, the stream's 3"):
        ShuffleRing(RowStream(with_side()), 32, 128).load_state_dict(ring.state_dict())


def test_a_finite_stream_gives_each_once(tmp_path, with_side):
    store = harvest(with_side(), tmp_path, n_rows=300)
    ring = ShuffleRing(RowStream(store, epochs_infinite=False), 32, 128)
    n = 0
    while len(ring) or not n:
        drawn = ring.draw()
        assert torch.equal(drawn.side, side_of(drawn.input))
        n += len(drawn.input)
    assert n == store.n_rows
    assert RowStream(store).read(0).side.shape == (0, 3)


def test_arrays_have_them_too(tmp_path: Path):
    rows, side = torch.randn(100, 6), torch.randn(100, 4)
    source = ArraySource([rows[:30], rows[30:]], side=[side[:50], side[50:]], batch_rows=40)
    assert source.d_side == 4
    assert torch.equal(torch.cat([batch.side for batch in source.batches()]), side)
    assert torch.equal(torch.cat([batch.side for batch in source.batches(1)]), side[40:])
    assert source.provenance != ArraySource(rows, batch_rows=40).provenance
    with pytest.raises(UnweaveError, match="array and side must have equally many rows, found 100 and 99"):
        ArraySource(rows, side=side[1:])
    with pytest.raises(UnweaveError, match="array and side must have equally many rows"):
        list(ArraySource([rows], side=[side[1:]]).batches())


def test_a_batch_keeps_them_when_it_is_cut(with_side):
    from unweave.evaluation._rows import cut

    batch = with_side().batch(0)
    chosen = batch.select(torch.arange(batch.n_rows) % 2 == 0)
    assert torch.equal(chosen.side, side_of(chosen.input))
    for part in cut(batch, 20):
        assert torch.equal(part.side, side_of(part.input))
