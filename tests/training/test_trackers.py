"""Trackers get every line, are closed whatever happens, and are imported only when asked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import unweave.training
from unweave.errors import UnweaveError
from unweave.training import Tracker, TrainingConfig, train
from unweave.training.trackers import TensorBoard, Wandb, make_trackers


class Recorder:
    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at
        self.events: list[Any] = []

    def start(self, run_id: str, config: dict[str, Any], folder: Path | None) -> None:
        self.events.append(("start", run_id, config))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.events.append(step)
        if step == self.fails_at:
            raise RuntimeError("the network is down")

    def finish(self) -> None:
        self.events.append("finish")


def run(tracker: Any, folder: Path | None = None) -> unweave.training.Trained:
    from unweave import dictionaries
    from unweave.activations import RowStream
    from unweave.sources.arrays import ArraySource

    rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    config = TrainingConfig(n_rows=6 * 16, batch_size=16, log_every=2, checkpoint_every=2)
    dictionary = dictionaries.build("topk", d_in=4, n_features=8, k=2)
    return train(dictionary, RowStream(ArraySource(rows)), config, folder, trackers=tracker)


def test_a_tracker_sees_everything() -> None:
    recorder = Recorder()
    run(recorder)
    (_, _, config), *rest = recorder.events
    assert rest == [2, 4, 6, "finish"]
    assert config["arch"] == "topk"
    assert config["k"] == 2
    assert config["batch_size"] == 16


def test_finished_after_an_error_and_resumed_under_the_same_id(tmp_path: Path) -> None:
    broken, after = Recorder(fails_at=4), Recorder()
    with pytest.raises(RuntimeError, match="network"):
        run([broken], tmp_path)
    assert broken.events[-1] == "finish"
    run([after], tmp_path)
    assert after.events[0][1] == broken.events[0][1]
    assert after.events[1:] == [4, 6, "finish"]


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, metrics: dict, step: int) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finish")

    fake = ModuleType("wandb")
    fake.init = lambda **options: calls.append(options) or Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trained = run(Wandb(project="p", mode="offline"), tmp_path)
    options, *logged, end = calls
    assert options["project"] == "p"
    assert options["resume"] == "allow"
    assert options["config"]["n_features"] == 8
    assert [step for step, _ in logged] == [2, 4, 6]
    assert logged[-1][1]["fvu"] == trained.metrics[-1]["fvu"]
    assert None not in logged[-1][1].values()
    assert end == "finish"


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_missing_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UnweaveError, match=rf"needs the {name} package: pip install 'unweave\[track\]'"):
        run(name, tmp_path)


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_writes_events(tmp_path: Path) -> None:
    run(TensorBoard(), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_names_and_objects() -> None:
    assert isinstance(make_trackers("wandb")[0], Wandb)
    assert isinstance(Recorder(), Tracker)
    with pytest.raises(UnweaveError, match="did you mean 'tensorboard'"):
        make_trackers(["tensorbord"])
    with pytest.raises(UnweaveError, match="expected a tracker"):
        make_trackers([3])  # type: ignore[list-item]


def test_importing_training_imports_nothing_heavy() -> None:
    heavy = ["wandb", "tensorboard", "sklearn", "transformers", "pandas", "fastapi", "datasets"]
    code = f"import sys, unweave.training; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
