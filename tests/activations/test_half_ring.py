"""HalfRing: test (c) of FAST's mixing buffer."""

from __future__ import annotations

import pytest
import torch

from unweave.activations import HalfRing, RowStream
from unweave.errors import UnweaveError
from unweave.sources import ArraySource


def numbered(n: int) -> ArraySource:
    return ArraySource(torch.arange(n, dtype=torch.float64)[:, None].repeat(1, 2))


def rows_of(batch) -> list[int]:
    return batch[0][:, 0].long().tolist()


def held(ring) -> list[int]:
    return sorted(ring.state_dict()["input"][:, 0].long().tolist())


def test_each_cycle_gives_half_once_and_replaces_just_that():
    ring = HalfRing(RowStream(numbered(100_000)), batch_size=16, capacity=300, seed=3)
    assert ring.capacity == 288  # the most that is an even number of batches
    ring.sample(1)
    expected, fresh = set(range(288)), 288
    for _ in range(40):
        assert set(held(ring)) == expected
        given = [row for _ in range(9) for row in rows_of(ring.next())]
        assert len(given) == len(set(given)) == 144  # exactly half, no row twice
        assert set(given) < expected  # a part of a permutation of what is held
        assert given != sorted(given)
        expected = (expected - set(given)) | set(range(fresh, fresh + 144))
        fresh += 144


def test_rows_stay_two_cycles_on_average():
    """60 cycles of 512 rows."""
    ring = HalfRing(RowStream(numbered(200_000)), batch_size=64, capacity=1024, seed=0)
    stays: list[float] = []
    for cycle in range(80):
        for _ in range(8):
            for row in rows_of(ring.next()):
                entered = 0 if row < 1024 else (row - 1024) // 512 + 1
                stays += [cycle - entered + 1] if cycle >= 20 else []
    assert abs(sum(stays) / len(stays) - 2) < 0.05  # seen: 1.998 to 2.001 for seeds 0 to 4
    # A cycle begins with all places taken and ends with half of them: three quarters mix, on average (0.788 to 0.798).
    assert 0.7 < ring.stats()["effective_rows"] / 1024 < 0.85


@pytest.mark.parametrize(("n", "batch_size", "capacity"), [(1000, 16, 300), (130, 16, 300), (20, 16, 64), (64, 16, 64)])
def test_a_finite_stream_is_given_once(n, batch_size, capacity):
    ring = HalfRing(RowStream(numbered(n), epochs_infinite=False), batch_size, capacity)
    given = [row for batch in ring for row in rows_of(batch)]
    assert sorted(given) == list(range(n))


@pytest.mark.parametrize("steps", [0, 3, 9, 14])
def test_it_goes_on_where_it_was_left(steps):
    def ring():
        return HalfRing(RowStream(numbered(3000)), batch_size=16, capacity=288, seed=1)

    whole, first, second = ring(), ring(), ring()
    for _ in range(steps):
        whole.next()
        first.next()
    second.load_state_dict(first.state_dict())
    assert all(rows_of(whole.next()) == rows_of(second.next()) for _ in range(40))


def test_sizes_are_checked_and_a_small_one_is_two_batches():
    assert HalfRing(RowStream(numbered(100)), batch_size=10, capacity=12).capacity == 20
    with pytest.raises(UnweaveError, match="1 <= batch_size <= capacity"):
        HalfRing(RowStream(numbered(100)), batch_size=10, capacity=9)


def test_training_resumes_with_it_bit_for_bit(tmp_path):
    from unweave.dictionaries import build
    from unweave.training import TrainingConfig, train

    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(
        n_rows=3200, batch_size=32, ring_rows=256, mixing="halves", checkpoint_every=30, engine="reference"
    )

    def run(folder, stop_after=None):
        torch.manual_seed(0)
        dictionary = build("topk", d_in=8, n_features=16, k=2)
        if stop_after:
            observe, calls = dictionary.observe, iter(range(10**9))

            def stopping(loss, progress):
                observe(loss, progress)
                if next(calls) == stop_after:
                    raise KeyboardInterrupt

            dictionary.observe = stopping
        return train(dictionary, RowStream(ArraySource(x)), config, folder).dictionary

    quiet = run(tmp_path / "quiet").state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 40)
    resumed = run(tmp_path / "killed").state_dict()
    assert all(torch.equal(quiet[name], resumed[name]) for name in quiet)
