"""A training that was stopped and resumed ends with the very weights of one that was not."""

from __future__ import annotations

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import unweave
from unweave.activations import ActivationStore, RowStream
from unweave.batch import ActivationBatch
from unweave.dictionaries import Dictionary, Loss, build, get
from unweave.errors import UnweaveError
from unweave.files import read_tensors
from unweave.sources import ArraySource
from unweave.training import TrainingConfig, train

WORKER = Path(__file__).parent / "worker.py"
_spec = importlib.util.spec_from_file_location("unweave_training_worker", WORKER)
assert _spec is not None
assert _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)

MEASURED = {"rows_per_s"}  # differs from run to run by nature


class Stop(Exception):
    pass


def stop_at(dictionary: Any, step: int) -> Dictionary:
    """Make a dictionary raise in its ``step``-th step, after the optimiser has moved the weights."""
    calls = iter(range(1, 10**9))
    observe = dictionary.observe

    def stopping(loss: Loss, progress: float) -> None:
        observe(loss, progress)
        if next(calls) == step:
            raise Stop

    dictionary.observe = stopping
    return dictionary


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "dictionary" / "dictionary.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in text.splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert lines(a) == lines(b)


@pytest.mark.parametrize("arch", worker.ARCHITECTURES)
def test_stopped_by_an_exception_then_resumed(arch: str, tmp_path: Path) -> None:
    rng = random.Random(arch)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(worker.make(arch), worker.stream(), worker.CONFIG, whole)
    for steps in (rng.randrange(8, 70), rng.randrange(1, 70)):  # steps of this attempt
        with pytest.raises(Stop):
            train(stop_at(worker.make(arch), steps), worker.stream(), worker.CONFIG, broken)
        torch.manual_seed(rng.randrange(2**31))  # the caller's random state must not matter
    train(worker.make(arch), worker.stream(), worker.CONFIG, broken)
    assert_same_run(whole, broken)
    assert not (broken / "checkpoints").exists()


# Architectures that draw, count or remember something on the way.
WITH_STATE: dict[str, dict[str, Any]] = {
    "matryoshka": {"k": 3, "prefixes": "random", "n_prefixes": 4},
    "ort": {"k": 3, "chunk_size": 12, "every": 2},
    "p_anneal": {},
    "gated": {"p_end": 0.3},
    "switch": {"k": 3, "n_experts": 4},
}


@pytest.mark.parametrize("arch", WITH_STATE)
def test_what_is_drawn_and_counted_goes_on_too(arch: str, tmp_path: Path) -> None:
    def make() -> Dictionary:
        torch.manual_seed(2)
        return build(arch, d_in=24, n_features=48, **WITH_STATE[arch])

    config = worker.CONFIG.replace(n_rows=60 * 64)
    train(make(), worker.stream(), config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(stop_at(make(), 38), worker.stream(), config, tmp_path / "broken")
    train(make(), worker.stream(), config, tmp_path / "broken")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("kind", ["store", "transcoder"])
def test_resumed_from_a_store(kind: str, tmp_path: Path) -> None:
    rows = worker.rows()
    target = rows[:, :10] * 5 - 1 if kind == "transcoder" else None
    store = ActivationStore.create(
        tmp_path / "store", {"kind": "array"}, d_in=24, d_out=None if target is None else 10, dtype="bfloat16"
    )
    for i in range(0, 2000, 100):
        part = None if target is None else target[i : i + 100].bfloat16()
        store.append(ActivationBatch.of_rows(rows[i : i + 100].bfloat16(), part, i))
    store.finish()

    def make() -> Dictionary:
        from unweave import dictionaries

        torch.manual_seed(0)
        options = {} if target is None else {"d_out": 10, "subtract_bias": False}
        return dictionaries.build("batch_topk", d_in=24, n_features=48, k=3, **options)

    def stream() -> RowStream:
        return RowStream(ActivationStore.open(tmp_path / "store"), seed=0, block_rows=32)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(make(), stream(), worker.CONFIG, whole)
    with pytest.raises(Stop):
        train(stop_at(make(), 75), stream(), worker.CONFIG, broken)
    train(make(), stream(), worker.CONFIG, broken)
    assert_same_run(whole, broken)


KILLS = ["batch_topk", pytest.param("topk jumprelu relu", marks=pytest.mark.slow)]


@pytest.mark.parametrize("killed", KILLS)
def test_killed_then_resumed_in_other_processes(killed: str, tmp_path: Path) -> None:
    archs, whole, broken = killed.split(), tmp_path / "whole", tmp_path / "broken"

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-W", "ignore", str(WORKER), str(folder), *archs]

    reference = subprocess.Popen(command(whole), stdout=subprocess.DEVNULL)
    rng = random.Random(killed)
    for arch in archs:
        kill_at = rng.randrange(8, 140)
        with subprocess.Popen(command(broken), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            for line in process.stdout:
                name, step = line.split()
                if name == arch and int(step) >= kill_at:
                    time.sleep(rng.random() * 0.01)
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
        assert not (broken / arch / "training.json").exists()
        assert (broken / arch / "checkpoints" / "latest.safetensors").exists()
    subprocess.run(command(broken), stdout=subprocess.DEVNULL, check=True)
    assert reference.wait() == 0
    for arch in archs:
        assert_same_run(whole / arch, broken / arch)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import unweave.files

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(worker.make("topk"), worker.stream(), worker.CONFIG, whole)
    replace, count = unweave.files.os.replace, iter(range(100))

    def dying(source: Path, to: Path) -> None:
        if next(count) == 5:
            raise Stop
        replace(source, to)

    with monkeypatch.context() as patched:
        patched.setattr(unweave.files.os, "replace", dying)
        with pytest.raises(Stop):
            train(worker.make("topk"), worker.stream(), worker.CONFIG, broken)
    train(worker.make("topk"), worker.stream(), worker.CONFIG, broken)
    assert_same_run(whole, broken)


def test_finished_training_is_read_back(tmp_path: Path) -> None:
    first = train(worker.make("topk"), worker.stream(), worker.CONFIG, tmp_path)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    dictionary = stop_at(worker.make("topk"), 1)  # would raise if it trained
    again = train(dictionary, worker.stream(), worker.CONFIG, tmp_path)
    assert again.dictionary is dictionary
    assert not dictionary.training
    for name, value in first.dictionary.state_dict().items():
        assert torch.equal(dictionary.state_dict()[name], value)
    assert again.metrics == first.metrics
    assert again.health == first.health
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before


def test_another_config_is_refused_and_harmless_fields_are_not(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(stop_at(worker.make("topk"), 50), worker.stream(), worker.CONFIG, tmp_path)
    with pytest.raises(UnweaveError, match=r"step 49.*lr: there None, now 0\.5.*another folder"):
        train(worker.make("topk"), worker.stream(), worker.CONFIG.replace(lr=0.5), tmp_path)
    with pytest.raises(UnweaveError, match="arch: there 'topk', now 'relu'"):
        train(worker.make("relu"), worker.stream(), worker.CONFIG, tmp_path)
    other_data = RowStream(worker.ArraySource(worker.rows() + 1, batch_rows=100), seed=3)
    with pytest.raises(UnweaveError, match="data: there"):
        train(worker.make("topk"), other_data, worker.CONFIG, tmp_path)
    config = worker.CONFIG.replace(checkpoint_every=50, keep_checkpoint=True)
    train(worker.make("topk"), worker.stream(), config, tmp_path)
    assert (tmp_path / "checkpoints" / "latest.safetensors").exists()
    with pytest.raises(UnweaveError, match=r"finished.*batch_size: there 64, now 32"):
        train(worker.make("topk"), worker.stream(), worker.CONFIG.replace(batch_size=32), tmp_path)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(stop_at(worker.make("topk"), 50), worker.stream(), worker.CONFIG, tmp_path)
    path = tmp_path / "checkpoints" / "latest.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnweaveError, match=r"latest\.safetensors.*(cut short|damaged)"):
        train(worker.make("topk"), worker.stream(), worker.CONFIG, tmp_path)


def test_nan_stops_with_one_message_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    dictionary = worker.make("topk")
    loss = dictionary.loss
    calls = iter(range(1, 10**9))

    def breaking(batch: Any) -> Loss:
        made = loss(batch)
        return Loss(made.total * float("nan"), made.terms, made.code) if next(calls) == 20 else made

    dictionary.loss = breaking  # type: ignore[method-assign]
    config = worker.CONFIG.replace(engine="autograd")  # what a dictionary with a loss replaced is trained by
    with pytest.raises(UnweaveError, match=r"broke down at step 20 of 150: loss nan.*learning rate"):
        train(dictionary, worker.stream(), config, tmp_path)
    assert all(torch.isfinite(p).all() for p in dictionary.parameters())
    whole = tmp_path / "whole"
    train(worker.make("topk"), worker.stream(), config, whole)
    train(worker.make("topk"), worker.stream(), config, tmp_path)
    assert_same_run(whole, tmp_path)


def test_time_based_checkpoints_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import unweave.training.loop as loop

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", 1.0)
    config = TrainingConfig(**{**worker.CONFIG.to_dict(), "checkpoint_every": None})
    never = config.replace(checkpoint_every=0)
    a = train(worker.make("jumprelu"), worker.stream(), config, tmp_path)
    b = train(worker.make("jumprelu"), worker.stream(), never)
    for name, value in a.dictionary.state_dict().items():
        assert torch.equal(b.dictionary.state_dict()[name], value)


def test_a_setting_that_was_not_there_yet_stood_at_its_default(tmp_path: Path) -> None:
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    settings = {"arch": "topk", "n_features": 16, "k": 2, "n_rows": 400, "batch_size": 50, "folder": tmp_path}
    made = unweave.fit(rows, **settings)
    summary = json.loads((tmp_path / "training.json").read_text())
    for setting, fits in ((None, True), (not summary["config"].pop("normalise_input"), False)):
        changed = {} if setting is None else {"normalise_input": setting}
        record = {**summary, "config": {**summary["config"], **changed}}
        (tmp_path / "training.json").write_text(json.dumps(record))
        if fits:
            assert torch.equal(unweave.fit(rows, **settings).W_enc, made.W_enc)
        else:
            with pytest.raises(UnweaveError, match="belongs to another training: normalise_input"):
                unweave.fit(rows, **settings)


def test_a_resumed_run_keeps_the_rate_it_began_with(tmp_path, monkeypatch):
    """A default learning rate of another version must not take over half way."""
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(n_rows=2000, batch_size=100, ring_rows=400, checkpoint_every=5, log_every=5)

    def run(folder, stop=None):
        torch.manual_seed(0)
        dictionary = build("topk", 6, 20, k=2)
        if stop is not None:
            dictionary = stop_at(dictionary, stop)
        return train(dictionary, RowStream(ArraySource(rows), seed=0), config, folder)

    whole = run(tmp_path / "whole").dictionary
    with pytest.raises(Stop):
        run(tmp_path / "killed", stop=12)
    monkeypatch.setattr(get("topk"), "lr_at_16k", 1.0)
    again = run(tmp_path / "killed").dictionary
    assert torch.equal(again.W_enc, whole.W_enc)
