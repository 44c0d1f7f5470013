"""The reading thread: the same rows, the same states, errors where they belong, and no thread left behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from unweave.activations import ActivationStore, RowStream, ShuffleRing, harvest
from unweave.activations import _readahead as readahead
from unweave.activations import stream as stream_module
from unweave.activations._readahead import ReadAhead
from unweave.errors import UnweaveError


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "unweave read ahead"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert threads() == []


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Far smaller than the tests' stores, so that threads have something left to do."""
    monkeypatch.setattr(stream_module, "_GROUP_ROWS", 100)


@pytest.fixture(params=[None, "int8"])
def store(request, tmp_path, fake_source) -> ActivationStore:
    return harvest(fake_source(n_batches=60), tmp_path / "s", n_rows=2000, shard_rows=300, dtype=request.param)


# ---- by itself -----------------------------------------------------------------------------------------------------


def test_the_items_in_their_order_and_then_the_end():
    ahead = ReadAhead(iter(range(1000)), depth=3)
    assert list(ahead) == list(range(1000))
    assert next(ahead, None) is None
    assert threads() == []


def test_no_further_ahead_than_its_depth():
    made: list[int] = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    ahead = ReadAhead(items(), depth=2)
    for taken in range(1, 10):
        next(ahead)
        time.sleep(0.01)
        assert len(made) <= taken + 2
    ahead.close()
    assert len(made) < 15
    assert next(ahead, None) is None  # closed: nothing more, and nobody waits for a thread that is gone


def test_an_error_comes_where_its_item_would_have():
    def items():
        yield 1
        yield 2
        raise UnweaveError("the disk is gone")

    ahead = ReadAhead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(UnweaveError, match="the disk is gone"):
        next(ahead)
    assert next(ahead, None) is None


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_collected_at_any_moment_it_ends_its_thread(taken):
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    ahead = ReadAhead(items())
    for _ in range(taken):
        next(ahead)
    assert len(threads()) == 1
    del ahead
    gc.collect()
    assert threads() == []
    assert closed.is_set()


# ---- under a stream ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [7, 64, 5000])
def test_rows_and_states_are_those_without_it(store, block_rows):
    plain, ahead = (RowStream(store, seed=3, block_rows=block_rows, read_ahead=on) for on in (False, True))
    for n in (1, 6, 7, 300, 5, 2500, 64, 1999):  # across blocks, shards and epochs
        a, b = plain.read(n), ahead.read(n)
        assert a.input.dtype == b.input.dtype
        assert torch.equal(a.input, b.input)
        assert torch.equal(a.document, b.document)
        assert b.target is b.input
        assert plain.state_dict() == ahead.state_dict()
    assert len(threads()) <= 1  # none where it has read to the end of the epoch
    ahead.close()


def test_separate_targets_and_one_epoch(tmp_path, fake_source):
    store = harvest(fake_source(d_target=5), tmp_path, n_rows=400, shard_rows=100)
    plain, ahead = (RowStream(store, epochs_infinite=False, block_rows=32, read_ahead=on) for on in (False, True))
    while not plain.ended:
        a, b = plain.read(60), ahead.read(60)
        assert torch.equal(a.input, b.input)
        assert torch.equal(a.target, b.target)
    assert ahead.ended
    assert threads() == []  # the data is at its end, and so is the thread


@pytest.mark.parametrize("drawn", [0, 1, 9, 150])
def test_a_state_counts_what_was_handed_out_and_not_what_was_read(store, drawn):
    """Saved with the thread, loaded without it, and the other way round."""

    def make(on: bool) -> ShuffleRing:
        return ShuffleRing(RowStream(ActivationStore.open(store.folder), seed=4, read_ahead=on), 32, 256, seed=9)

    for first, second in ((True, False), (False, True), (True, True)):
        ring = make(first)
        for _ in range(drawn):
            ring.next()
        time.sleep(0.02)  # the thread runs ahead as far as it may
        state = ring.state_dict()
        json.dumps(state["stream"])
        resumed = make(second)
        resumed.next()  # and its own thread is ahead somewhere else
        resumed.load_state_dict(state)
        for _ in range(100):
            assert torch.equal(ring.next()[0], resumed.next()[0])
        assert ring.stats() == resumed.stats()


def test_an_error_while_reading_is_the_readers_and_loses_no_place(store, monkeypatch):
    stream, twin = (RowStream(store, seed=1, block_rows=16, read_ahead=on) for on in (True, False))
    assert torch.equal(stream.read(100).input, twin.read(100).input)
    stream.close()
    read = stream._blocks.pieces

    def broken(order):
        yield from read(order[:1])
        raise UnweaveError("the shard is gone")

    monkeypatch.setattr(stream._blocks, "pieces", broken)
    for _ in range(3):  # again and again, and never taken for the end of an epoch
        with pytest.raises(UnweaveError, match="the shard is gone"):
            stream.read(500)
        assert stream.epoch == 0
    monkeypatch.undo()
    assert torch.equal(stream.read(700).input, twin.read(700).input)
    stream.close()


def test_a_dropped_stream_takes_its_thread_along(store):
    ring = ShuffleRing(RowStream(store, read_ahead=True, block_rows=50), 32, 256)
    ring.next()
    assert len(threads()) == 1
    del ring
    gc.collect()
    assert threads() == []


def test_a_closed_stream_goes_on_where_it_was(store):
    stream, twin = RowStream(store, read_ahead=True), RowStream(store, read_ahead=False)
    for _ in range(5):
        assert torch.equal(stream.read(333).input, twin.read(333).input)
        stream.close()
        assert threads() == []


def test_none_with_one_core_and_none_for_a_source(store, fake_source, monkeypatch):
    monkeypatch.setattr(readahead.os, "sched_getaffinity", lambda _: {0}, raising=False)
    stream = RowStream(store)
    stream.read(10)
    assert threads() == []
    monkeypatch.setattr(readahead.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    stream = RowStream(store, block_rows=50)
    stream.read(10)
    assert len(threads()) == 1
    stream.close()
    live = RowStream(fake_source(), read_ahead=True)  # a model is run where it is called, by nobody else
    live.read(10)
    assert threads() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_on_by_itself(store):
    stream = RowStream(store, read_ahead=True, block_rows=16)
    stream.read(50)
    child = os.fork()
    if child == 0:
        try:
            same = torch.equal(stream.read(900).input, RowStream(store, block_rows=16).read(950).input[50:])
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done == (child, 0)
    stream.close()


def test_a_program_ends_though_it_never_closed_its_stream(store):
    script = (
        "import sys\nfrom unweave.activations import ActivationStore, RowStream\n"
        "stream = RowStream(ActivationStore.open(sys.argv[1]), read_ahead=True)\n"
        "print(len(stream.read(10).input))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(store.folder)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "10", "")
