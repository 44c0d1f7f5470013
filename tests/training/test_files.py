"""The checkpoint file and the metrics log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unweave.errors import UnweaveError
from unweave.files import write_tensors
from unweave.training.checkpoint import read_checkpoint, write_checkpoint
from unweave.training.metrics_log import MetricsLog, read_metrics


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    buffer = torch.arange(10.0)
    state = {
        "weights": {"a.b": buffer[:5], "c": buffer[2:7], "empty": torch.zeros(0, 3)},  # two views of one memory
        "list": [1, torch.tensor(3), {"x": None}],
        "big": 2**100,
        "float": 0.1 + 0.2,
        "bfloat": torch.ones(2, dtype=torch.bfloat16),
    }
    write_checkpoint(tmp_path / "c", state)
    read = read_checkpoint(tmp_path / "c")
    for name in state["weights"]:
        assert torch.equal(read["weights"][name], state["weights"][name])
    assert read["list"][0] == 1
    assert read["list"][1] == 3
    assert read["list"][2] == {"x": None}
    assert read["big"] == 2**100
    assert read["float"] == 0.1 + 0.2
    assert read["bfloat"].dtype == torch.bfloat16


def test_other_files_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"a": torch.ones(1)})
    with pytest.raises(UnweaveError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "t")
    with pytest.raises(UnweaveError, match="no file"):
        read_checkpoint(tmp_path / "missing")


def test_log_is_cut_back_to_the_cursor(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1, "fvu": float("nan")})
    log.append({"step": 2, "fvu": 0.5})
    cursor = log.cursor()
    log.append({"step": 3, "fvu": 0.4})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "fv')  # cut short by a kill
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path, cursor)
    assert log.lines == [{"step": 1, "fvu": None}, {"step": 2, "fvu": 0.5}]
    log.append({"step": 3, "fvu": 0.3})
    log.close()
    assert [line["fvu"] for line in read_metrics(path)] == [None, 0.5, 0.3]


def test_log_starts_anew_without_a_cursor(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    log = MetricsLog(path)
    log.close()
    assert log.lines == []
    assert path.read_text() == ""


def test_log_in_memory() -> None:
    log = MetricsLog(None)
    log.append({"step": 1})
    assert log.lines == [{"step": 1}]
    assert log.cursor() == 0
    log.close()
