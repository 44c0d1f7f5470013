"""Side inputs in training: the loss gets those of its rows, unscaled; a killed run goes on with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import unweave
from unweave.activations import ActivationStore, RowStream, harvest
from unweave.dictionaries import Loss, TopK, TrainingBatch, build
from unweave.errors import UnweaveError
from unweave.sources import ArraySource
from unweave.training import TrainingConfig, train, train_many

ROWS = torch.randn(600, 6, generator=torch.Generator().manual_seed(0))
SIDE = torch.cat([ROWS[:, :2] * 10, ROWS[:, 2:] + 1], 1)
OPTIONS = {"n_rows": 4000, "batch_size": 100, "ring_rows": 300, "checkpoint_every": 7}


class Watching(TopK):
    """TopK that looks at the side inputs of its batches."""

    name = "test_watching"

    def loss(self, batch: TrainingBatch) -> Loss:
        assert batch.side is not None
        scale = (batch.input / batch.side[:, :1] * 10)[:, 0]  # the row's own first number, scaled
        torch.testing.assert_close(scale, scale[:1].expand_as(scale))
        return super().loss(batch)


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return harvest(ArraySource(ROWS, side=SIDE, batch_rows=50), tmp_path / "store", n_rows=600, shard_rows=150)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_each_row_comes_with_its_own(store: ActivationStore, engine: str) -> None:
    dictionary = Watching(Watching.Config(d_in=6, d_out=6, n_features=20, k=2))
    train(dictionary, RowStream(store), TrainingConfig(**OPTIONS, engine=engine))


@pytest.mark.parametrize("arch", ["topk", "jumprelu"])
def test_who_does_not_ask_is_trained_as_without(arch: str) -> None:
    found = [unweave.fit(ROWS, arch, k=2, n_features=20, side=side, **OPTIONS) for side in (None, SIDE)]
    first, second = (dictionary.state_dict() for dictionary in found)
    assert all(torch.equal(first[name], second[name]) for name in first)


def g_sae(store: ActivationStore, folder: Path, stop: int | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    dictionary = build("g_sae", 6, 20, k=2)
    if stop is not None:
        steps, observe = iter(range(stop)), dictionary.observe
        dictionary.observe = lambda loss, progress: (next(steps), observe(loss, progress))[1]
    return train(dictionary, RowStream(store, seed=1), TrainingConfig(**OPTIONS), folder).dictionary.state_dict()


def test_a_killed_run_ends_bit_for_bit(store: ActivationStore, tmp_path: Path) -> None:
    whole = g_sae(store, tmp_path / "whole")
    with pytest.raises((StopIteration, RuntimeError)):
        g_sae(store, tmp_path / "killed", stop=17)
    assert (tmp_path / "killed" / "checkpoints" / "latest.safetensors").is_file()
    again = g_sae(store, tmp_path / "killed")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert float(whole["gradient_norm"]) == pytest.approx(float(SIDE.norm(dim=1).mean()), rel=0.05)


def test_a_grid_shares_them(store: ActivationStore, tmp_path: Path) -> None:
    alone = g_sae(store, tmp_path / "alone")
    torch.manual_seed(0)
    members = {"g": (build("g_sae", 6, 20, k=2), TrainingConfig(**OPTIONS))}
    members["t"] = (build("topk", 6, 20, k=2), TrainingConfig(**OPTIONS))
    found = train_many(members, RowStream(store, seed=1))["g"].dictionary.state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value)


def test_what_does_not_go_together_is_refused(store: ActivationStore) -> None:
    with pytest.raises(UnweaveError, match="brings its own side inputs"):
        unweave.fit(store, side=SIDE)
    with pytest.raises(UnweaveError, match="side does not go with an iterator"):
        unweave.fit(iter([ROWS]), side=SIDE)
