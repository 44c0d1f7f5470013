"""The schedule and the defaults."""

from __future__ import annotations

from itertools import pairwise

import pytest

from unweave.errors import UnweaveError
from unweave.training import TrainingConfig


def test_learning_rate_rises_stays_and_falls() -> None:
    config = TrainingConfig(n_rows=1000, batch_size=10, warmup=0.1, decay=0.2)
    factors = [config.lr_factor(step) for step in range(config.n_steps)]
    assert config.warmup_steps == 10
    assert factors[0] == pytest.approx(1 / 11)
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert set(factors[10:80]) == {1.0}
    assert all(a > b for a, b in pairwise(factors[79:]))
    assert factors[90] == pytest.approx(10 / 21)  # half of the way down
    assert 0 < factors[-1] < 0.05


def test_warmup_in_steps_and_without() -> None:
    assert TrainingConfig(n_rows=1000, batch_size=1, warmup=30).warmup_steps == 30
    config = TrainingConfig(n_rows=10, batch_size=1, warmup=0, decay=0)
    assert [config.lr_factor(step) for step in range(10)] == [1.0] * 10


def test_one_step_learns_something() -> None:
    assert TrainingConfig(n_rows=1, batch_size=64).lr_factor(0) > 0


def test_derived_numbers() -> None:
    config = TrainingConfig(n_rows=1001, batch_size=100)
    assert config.n_steps == 11
    assert config.log_steps == 1
    assert TrainingConfig(n_rows=10**8).log_steps == 100
    assert TrainingConfig(n_rows=10**4, batch_size=10).dead_rows == 500  # 50 batches, or a twentieth
    assert TrainingConfig(n_rows=10**6, batch_size=10).dead_rows == 50_000
    assert TrainingConfig(n_rows=10**10).dead_rows == 10_000_000
    assert TrainingConfig(n_rows=10, dead_after=7).dead_rows == 7


@pytest.mark.parametrize("bad", [{"n_rows": 0}, {"lr": -1.0}, {"decay": 2}, {"batchsize": 3}, {"warmup": -1}])
def test_bad_values_are_refused(bad: dict) -> None:
    with pytest.raises(UnweaveError, match=next(iter(bad))):
        TrainingConfig(**{"n_rows": 10, **bad})


def test_json_round_trip() -> None:
    config = TrainingConfig(n_rows=123, lr=1e-4, warmup=0.03)
    assert TrainingConfig.from_json(config.to_json()) == config
