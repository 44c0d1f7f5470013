from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unweave.activations import ActivationStore, harvest
from unweave.errors import UnweaveError


class Stop(BaseException):
    """Not an Exception, so nothing on the way can swallow it: as near to a kill as one process gets."""


def test_stops_at_the_batch_that_reaches_n_rows(tmp_path, fake_source):
    source = fake_source()
    sizes = [source.batch(i).n_rows for i in range(12)]
    wanted = sum(sizes[:5]) - 1
    store = harvest(source, tmp_path, n_rows=wanted, shard_rows=100)
    assert source.ran == [0, 1, 2, 3, 4]
    assert store.n_rows == sum(sizes[:5]) >= wanted
    assert store.complete
    assert store.provenance == {**source.provenance, "sizes": [3, 20]}
    store.verify(progress=False)


def test_a_finished_store_is_returned_at_once_and_grows_on_demand(tmp_path, fake_source, same_batch):
    harvest(fake_source(), tmp_path, n_rows=150, shard_rows=100)
    again = fake_source()
    first = harvest(again, tmp_path, n_rows=150)
    assert again.ran == []
    more = fake_source()
    store = harvest(more, tmp_path, n_rows=350)
    assert more.ran[0] == first.n_batches
    assert store.n_rows >= 350
    assert all(same_batch(a, more.batch(i)) for i, a in enumerate(store.batches()))


def test_interrupted_anywhere_and_resumed_is_bit_identical(tmp_path, fake_source, contents):
    whole = harvest(fake_source(), tmp_path / "whole", n_rows=320, shard_rows=100)
    n = whole.n_batches
    for at in range(n):

        def stop(i: int, at: int = at) -> None:
            if i == at:
                raise Stop

        folder = tmp_path / f"at{at}"
        with pytest.raises(Stop):
            harvest(fake_source(before=stop), folder, n_rows=320, shard_rows=100)
        done = ActivationStore.open(folder).n_batches if (folder / "manifest.json").exists() else 0
        source = fake_source()
        harvest(source, folder, n_rows=320, shard_rows=100)
        assert source.ran == list(range(done, n))  # the model is not run again for finished shards
        assert contents(folder) == contents(tmp_path / "whole")


KILLED = """
import os, runpy, signal, sys
import torch
torch.set_num_threads(1)
from unweave.activations import harvest
FakeSource = runpy.run_path(sys.argv[1])["FakeSource"]
fsync, replace = os.fsync, os.replace

for k in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        left = k
        def countdown(*_):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        def checked(call):
            return lambda *a: (countdown(), call(*a))[1]
        os.fsync, os.replace = checked(fsync), checked(replace)
        harvest(FakeSource(before=countdown), f"{sys.argv[2]}/{k}", n_rows=200, shard_rows=100)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(k, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_system_call_and_resumed_is_bit_identical(tmp_path, fake_source, contents):
    """kill -9 before each batch, each fsync and each rename of a harvest; then run it again."""
    whole = harvest(fake_source(), tmp_path / "whole", n_rows=200, shard_rows=100)
    points = whole.n_batches + 3 * (2 * whole.n_shards + 2)  # write = fsync, rename, fsync of the folder
    script = [sys.executable, "-c", KILLED, str(Path(__file__).parent / "conftest.py"), str(tmp_path), str(points)]
    made = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    outcomes = [int(line.split()[1]) for line in made.stdout.splitlines()]
    killed = [k for k, outcome in enumerate(outcomes) if outcome == signal.SIGKILL]
    assert len(killed) > whole.n_batches + 5 * whole.n_shards
    assert outcomes[-1] == 0, "the last point lies behind the end, so every earlier one was covered"
    leftovers = 0
    for k in killed:
        folder = tmp_path / str(k)
        leftovers += len(list(folder.glob(".*.tmp")))
        if (folder / "manifest.json").exists():
            ActivationStore.open(folder).verify(progress=False)  # what a reader meets is whole at any time
        harvest(fake_source(), folder, n_rows=200, shard_rows=100)
        assert contents(folder) == contents(tmp_path / "whole"), f"killed at point {k}"
    assert leftovers > 0, "the test must have met temporary files to show that they are cleaned"


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_damaged_shards_are_made_anew_and_nothing_else_is_touched(tmp_path, fake_source, contents, how):
    store = harvest(fake_source(), tmp_path / "a", n_rows=400, shard_rows=100)
    harvest(fake_source(), tmp_path / "b", n_rows=400, shard_rows=100)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("shard-*")}
    for index in (0, 2):
        path = tmp_path / "a" / f"shard-{index:05d}.safetensors"
        path.unlink() if how == "missing" else os.truncate(path, 1000)
        del kept[path.name]
    source = fake_source()
    repaired = harvest(source, tmp_path / "a", n_rows=400)
    sizes = [entry.n_batches for entry in store.manifest.shards]
    assert source.ran == [*range(sizes[0]), *range(sum(sizes[:2]), sum(sizes[:3]))]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in kept} == kept
    repaired.verify(progress=False)


def test_a_repair_from_changed_data_is_refused(tmp_path, fake_source):
    harvest(fake_source(), tmp_path, n_rows=400, shard_rows=100)
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.raises(UnweaveError, match=r"cannot repair .*shard-00001.*Has the data changed"):
        harvest(fake_source(n_batches=5), tmp_path, n_rows=400)
    assert (tmp_path / "shard-00000.safetensors").exists()


def test_another_source_is_refused_saying_what_differs(tmp_path, fake_source):
    harvest(fake_source(), tmp_path, n_rows=100)
    other = fake_source(name="other")
    with pytest.raises(UnweaveError, match=r'model.name: expected "other", found "fake"'):
        harvest(other, tmp_path, n_rows=200)
    assert other.ran == []
    with pytest.raises(UnweaveError, match="d_in: expected 9, found 8"):
        harvest(fake_source(d=9), tmp_path, n_rows=200)
    with pytest.raises(UnweaveError, match="seed: expected 1, found nothing"):
        harvest(fake_source(), tmp_path, n_rows=200, provenance_extra={"seed": 1})


def test_nan_rows_stop_the_harvest_and_keep_what_was_finished(tmp_path, fake_source):
    with pytest.raises(UnweaveError, match="batch 7 hold NaN or infinity"):
        harvest(fake_source(poison=(7, 2)), tmp_path, n_rows=400, shard_rows=100)
    kept = ActivationStore.open(tmp_path)
    kept.verify(progress=False)
    assert kept.n_rows >= 100
    assert harvest(fake_source(), tmp_path, n_rows=400).n_rows >= 400


def test_short_and_empty_sources(tmp_path, fake_source):
    store = harvest(fake_source(n_batches=3), tmp_path / "short", n_rows=10**6)
    assert store.complete
    assert store.n_batches == 3
    for empty in (fake_source(n_batches=0), _only_empty_batches(fake_source)):
        with pytest.raises(UnweaveError, match="no rows"):
            harvest(empty, tmp_path / "empty", n_rows=10)
    with pytest.raises(UnweaveError, match="n_rows"):
        harvest(fake_source(), tmp_path / "none", n_rows=0)


def _only_empty_batches(fake_source):
    source = fake_source(n_batches=2)
    make = source.batch
    source.batch = lambda i: make(3)
    return source


def test_two_harvests_do_not_write_into_one_folder(tmp_path, fake_source):
    refused = []

    def meanwhile(i: int) -> None:
        if i == 2:
            with pytest.raises(UnweaveError, match="another process is writing"):
                harvest(fake_source(), tmp_path, n_rows=200)
            refused.append(i)

    harvest(fake_source(before=meanwhile), tmp_path, n_rows=200)
    assert refused == [2]


def test_a_store_stands_in_for_its_source(tmp_path, fake_source, same_batch):
    store = harvest(fake_source(d_target=5), tmp_path / "a", n_rows=300, shard_rows=100)
    copy = harvest(store, tmp_path / "b", n_rows=store.n_rows, shard_rows=50)
    assert all(same_batch(a, b) for a, b in zip(store.batches(), copy.batches(), strict=True))


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounting needs root on Linux")
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path, fake_source, contents):
    disk = tmp_path / "disk"
    with small_disk(disk, "1m"):
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(500_000))
        folder = disk / "store"

        def source():
            return fake_source(d=1024, n_batches=12)

        with pytest.raises(UnweaveError) as error:
            harvest(source(), folder, n_rows=400, shard_rows=50)
        assert "No space left" in str(error.value)
        assert "Free some space" in str(error.value)
        kept = ActivationStore.open(folder)
        kept.verify(progress=False)
        assert kept.n_rows >= 50
        assert not list(folder.glob(".*.tmp"))
        ballast.unlink()
        resumed = source()
        harvest(resumed, folder, n_rows=400, shard_rows=50)
        assert resumed.ran[0] == kept.n_batches
        harvest(source(), tmp_path / "whole", n_rows=400, shard_rows=50)
        assert contents(folder) == contents(tmp_path / "whole")
        torch.testing.assert_close(kept.rows([0]), resumed.batch(0).input[:1])
