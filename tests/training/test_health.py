"""The health report speaks when something is off, names the cause, and is silent otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from unweave.training import TrainingConfig, health

CONFIG = TrainingConfig(n_rows=1_000_000, batch_size=1000)
FINE = {
    "fvu": 0.2,
    "l0": 31.0,
    "dead_share": 0.01,
    "lr": 1e-4,
    "same_document_rate": 0.002,
    "expected_same_document_rate": 0.001,
}
NORMS = {"rms": 30.0, "median": 29.0, "largest": 80.0}
K32 = SimpleNamespace(k=32, n_features=1000)


def report(config: TrainingConfig = CONFIG, norms: dict = NORMS, dictionary: Any = K32, **changes: Any) -> list[str]:
    return health([{**FINE, "fvu": 0.9}, {**FINE, **changes}], config, dictionary, input_norms=norms)


def test_silent_when_all_is_well() -> None:
    assert report() == []
    assert health([], CONFIG) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dead_share": 0.4}, "40% of the features are dead"),
        ({"fvu": 1.2}, "explains nothing"),
        ({"fvu": None}, None),
        ({"l0": 10.0}, "fewer than the k = 32"),
        ({"l0": 50.0}, "more than the k = 32"),
        ({"l0": 0.0}, "No feature fires"),
        ({"same_document_rate": 0.4}, "Batches are correlated: 20.1%"),
    ],
)
def test_one_sentence_a_trouble(changes: dict, words: str | None) -> None:
    found = report(**changes)
    if words is None:
        assert found == []
    else:
        assert len(found) == 1
        assert words in found[0]


def test_dead_because_of_too_few_rows() -> None:
    found = report(dictionary=SimpleNamespace(k=32, n_features=65_536), dead_share=0.5)
    assert "1,000,000 rows are few for 65,536 features" in found[0]


def test_target_l0_is_read_as_well() -> None:
    assert "target_l0 = 8" in report(dictionary=SimpleNamespace(target_l0=8.0))[0]
    assert report(dictionary=SimpleNamespace(), l0=500.0) == []


def test_inputs() -> None:
    assert "far longer" in report(norms={"rms": 50.0, "median": 10.0, "largest": 900.0})[0]
    assert "normalise_input is off" in report(config=CONFIG.replace(normalise_input=False))[0]


def test_too_short() -> None:
    assert "warming up for 600 of 1,000" in report(config=CONFIG.replace(warmup=600))[0]
    assert "only 10 steps" in report(config=CONFIG.replace(n_rows=10_000), dead_share=0.0)[0]


def test_fvu_that_rises() -> None:
    lines = [{**FINE, "fvu": 0.9}, {**FINE, "fvu": 0.2}, {**FINE, "fvu": 0.5}]
    assert "rose from 0.2 to 0.5" in health(lines, CONFIG, K32, input_norms=NORMS)[0]


def test_correlation_of_a_live_source() -> None:
    assert report(expected_same_document_rate=None) == []
    assert "correlated" in report(expected_same_document_rate=None, same_document_rate=0.5)[0]
