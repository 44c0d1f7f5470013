"""Several stores from one pass: each is what harvesting its source alone would have made, whatever happened between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from unweave.activations import ActivationStore, harvest
from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.sources import SourceGroup


def fake_group(FakeSource, n_batches=12, before=None, poison=None):
    """Two sites of unequal width over the same batches; the deeper one leaves a third of its rows out."""

    class Deep(FakeSource):
        def batch(self, i: int) -> ActivationBatch:
            whole = super().batch(i)
            return whole.select(whole.meta.position % 3 != 1)

    class FakeGroup(SourceGroup):
        def __init__(self) -> None:
            self.ran: list[tuple[int, tuple[str, ...]]] = []

        @property
        def sources(self):
            return {
                "layers.2": FakeSource(n_batches=n_batches, name="a"),
                "layers.5": Deep(n_batches=n_batches, name="b", d=16, poison=poison),
            }

        def batches(self, skip: int = 0, names: Collection[str] | None = None) -> Iterator[dict]:
            wanted = {name: s for name, s in self.sources.items() if names is None or name in names}
            for i in range(skip, n_batches):
                if before:
                    before(i)
                self.ran.append((i, tuple(wanted)))
                yield {name: source.batch(i) for name, source in wanted.items()}

    return FakeGroup()


def folders(at: Path) -> dict[str, Path]:
    return {"layers.2": at / "layers.2", "layers.5": at / "layers.5"}


@pytest.fixture
def alone(tmp_path, fake_source, contents):
    """The bytes of each site harvested by itself, to 200 rows."""
    made = {}
    for name, source in fake_group(fake_source).sources.items():
        harvest(source, tmp_path / "alone" / name, n_rows=200, shard_rows=60)
        made[name] = contents(tmp_path / "alone" / name)
    return made


@pytest.fixture
def same(contents, alone):
    return lambda at: {name: contents(path) for name, path in folders(at).items()} == alone


def test_each_store_is_that_of_its_site_alone(tmp_path, fake_source, same):
    group = fake_group(fake_source)
    stores = harvest(group, folders(tmp_path), n_rows=200, shard_rows=60)
    assert same(tmp_path)
    assert list(stores) == ["layers.2", "layers.5"]
    assert stores["layers.2"].n_batches < stores["layers.5"].n_batches  # each stops where it has its rows
    assert [i for i, _ in group.ran] == list(range(stores["layers.5"].n_batches))
    assert all(store.complete and store.n_rows >= 200 for store in stores.values())


def test_what_is_there_is_not_run_again(tmp_path, fake_source, same):
    first = fake_group(fake_source)
    harvest(first, {"layers.5": folders(tmp_path)["layers.5"]}, n_rows=200, shard_rows=60)
    assert {names for _, names in first.ran} == {("layers.5",)}
    more = fake_group(fake_source)
    stores = harvest(more, folders(tmp_path), n_rows=200, shard_rows=60)
    assert {names for _, names in more.ran} == {("layers.2",)}
    assert same(tmp_path)
    again = fake_group(fake_source)
    harvest(again, folders(tmp_path), n_rows=200)
    assert again.ran == []
    harvest(again, folders(tmp_path), n_rows=stores["layers.2"].n_rows + 1)
    assert again.ran[0][0] == min(store.n_batches for store in stores.values())


def test_a_store_begun_alone_is_continued_with_others_and_the_other_way_round(tmp_path, fake_source, same):
    sources = fake_group(fake_source).sources
    harvest(sources["layers.2"], folders(tmp_path)["layers.2"], n_rows=70, shard_rows=60)
    harvest(fake_group(fake_source), folders(tmp_path / "x"), n_rows=70, shard_rows=60)
    for at in (tmp_path, tmp_path / "x"):
        # Rows that ended a harvest closed a shard early, so these bytes are those of a store grown in two steps.
        harvest(fake_group(fake_source), folders(at), n_rows=200, shard_rows=60)
        for name in sources:
            grown = ActivationStore.open(folders(at)[name])
            grown.verify(progress=False)
            assert grown.n_rows >= 200


class Stop(BaseException):
    pass


def test_interrupted_anywhere_and_resumed_is_bit_identical(tmp_path, fake_source, same):
    for at in range(9):

        def stop(i: int, at: int = at) -> None:
            if i == at:
                raise Stop

        folder = tmp_path / f"at{at}"
        with pytest.raises(Stop):
            harvest(fake_group(fake_source, before=stop), folders(folder), n_rows=200, shard_rows=60)
        harvest(fake_group(fake_source), folders(folder), n_rows=200, shard_rows=60)
        assert same(folder)


KILLED = """
import os, runpy, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from unweave.activations import harvest
here = Path(sys.argv[1])
FakeSource = runpy.run_path(str(here / "conftest.py"))["FakeSource"]
made = runpy.run_path(str(here / "test_harvest_sites.py"))
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
        group = made["fake_group"](FakeSource, before=countdown)
        harvest(group, made["folders"](Path(sys.argv[2]) / str(k)), n_rows=200, shard_rows=60)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(k, os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_any_system_call_and_resumed_is_bit_identical(tmp_path, fake_source, same):
    """kill -9 before each batch, each fsync and each rename, so also between the shards of two stores."""
    whole = harvest(fake_group(fake_source), folders(tmp_path / "whole"), n_rows=200, shard_rows=60)
    n_files = sum(2 * store.n_shards + 2 for store in whole.values())
    points = max(store.n_batches for store in whole.values()) + 3 * n_files
    script = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), str(points)]
    made = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    outcomes = [int(line.split()[1]) for line in made.stdout.splitlines()]
    killed = [k for k, outcome in enumerate(outcomes) if outcome == signal.SIGKILL]
    assert len(killed) > 5 * sum(store.n_shards for store in whole.values())
    assert outcomes[-1] == 0, "the last point lies behind the end, so every earlier one was covered"
    apart = set()
    for k in killed:
        there = folders(tmp_path / str(k))
        found = [ActivationStore.open(p) for p in there.values() if (p / "manifest.json").exists()]
        for store in found:
            store.verify(progress=False)
        apart.add(tuple(store.n_batches for store in found))
        harvest(fake_group(fake_source), there, n_rows=200, shard_rows=60)
        assert same(tmp_path / str(k)), f"killed at point {k}"
    ahead = {a > b for a, b in (pair for pair in apart if len(pair) == 2) if a != b}
    assert ahead == {False, True}, "the test must have met the one store ahead and the other ahead"


def test_a_damaged_shard_of_one_store_is_made_anew(tmp_path, fake_source, same):
    harvest(fake_group(fake_source), folders(tmp_path), n_rows=200, shard_rows=60)
    (tmp_path / "layers.5" / "shard-00001.safetensors").unlink()
    harvest(fake_group(fake_source), folders(tmp_path), n_rows=200)
    assert same(tmp_path)


def test_int8_stores_of_several_sites(tmp_path, fake_source, contents):
    stores = harvest(fake_group(fake_source), folders(tmp_path), n_rows=200, dtype="int8")
    assert {store.manifest.dtype for store in stores.values()} == {"int8"}
    for name, source in fake_group(fake_source).sources.items():
        harvest(source, tmp_path / "alone" / name, n_rows=200, dtype="int8")
        assert contents(tmp_path / "alone" / name) == contents(tmp_path / name)


def test_bad_rows_name_their_site_and_keep_what_was_finished(tmp_path, fake_source):
    with pytest.raises(UnweaveError, match=r"^layers.5: .*batch 7 hold NaN or infinity"):
        harvest(fake_group(fake_source, poison=(7, 2)), folders(tmp_path), n_rows=400, shard_rows=60)
    for path in folders(tmp_path).values():
        kept = ActivationStore.open(path)
        kept.verify(progress=False)
        assert kept.n_rows >= 60


def test_a_group_that_ends_early_and_one_without_rows(tmp_path, fake_source):
    stores = harvest(fake_group(fake_source, n_batches=3), folders(tmp_path / "short"), n_rows=10**6)
    assert all(store.complete and store.n_batches == 3 for store in stores.values())
    with pytest.raises(UnweaveError, match=r"^layers.2: the source gave no rows"):
        harvest(fake_group(fake_source, n_batches=0), folders(tmp_path / "none"), n_rows=10)


def test_folders_and_names_must_fit(tmp_path, fake_source):
    group = fake_group(fake_source)
    cases = {
        "give a folder for each": (group, tmp_path),
        "one site: give one folder": (fake_source(), folders(tmp_path)),
        r"no 'layers.9' in .*layers.2": (group, {"layers.9": tmp_path}),
        "a folder of its own": (group, {"layers.2": tmp_path, "layers.5": tmp_path / "x" / ".."}),
        "at least one site": (group, {}),
    }
    for message, (source, where) in cases.items():
        with pytest.raises(UnweaveError, match=message):
            harvest(source, where, n_rows=10)
    with pytest.raises(UnweaveError, match=r"no 'layers.9'"):
        harvest(group, folders(tmp_path), n_rows=10, provenance_extra={"layers.9": {}})
    stores = harvest(group, folders(tmp_path), n_rows=10, provenance_extra={"layers.2": {"seed": 1}})
    assert stores["layers.2"].provenance["seed"] == 1
    assert "seed" not in stores["layers.5"].provenance
