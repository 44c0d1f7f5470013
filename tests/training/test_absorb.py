"""A dictionary that learns without gradients: batches are handed to it, and a killed run goes on from its buffers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unweave
from unweave.activations import RowStream
from unweave.dictionaries import Loss, TrainingBatch
from unweave.dictionaries.topk import TopK
from unweave.sources.arrays import ArraySource
from unweave.training import TrainingConfig, train


class LastRows(TopK):
    """Atoms are the rows of the last batch: as little as a method without gradients can do."""

    name = "test_last_rows"
    learns_by_gradient = False

    def __init__(self, config) -> None:
        super().__init__(config)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def absorb(self, batch: TrainingBatch) -> Loss:
        self.seen += len(batch.input)
        self.W_dec.copy_(F.normalize(batch.input[: self.n_features] - self.b_dec, dim=1))
        code = self.encode(batch.input)
        squares = (batch.target - self.decode(code)).square().sum(1)
        return Loss(squares.mean(), {"seen": self.seen.double()}, code)

    def complete(self) -> None:
        self.W_enc.copy_(self.W_dec)


def stream() -> RowStream:
    return RowStream(ArraySource(torch.randn(400, 6, generator=torch.Generator().manual_seed(0))), seed=0)


def run(folder=None, stop: int | None = None):
    torch.manual_seed(0)
    dictionary = LastRows(LastRows.Config(d_in=6, d_out=6, n_features=20, k=2))
    config = TrainingConfig(n_rows=2000, batch_size=100, ring_rows=400, checkpoint_every=5, log_every=5)
    if stop is not None:
        steps = iter(range(stop))
        absorb = dictionary.absorb
        dictionary.absorb = lambda batch: (next(steps), absorb(batch))[1]  # StopIteration is the kill
    return train(dictionary, stream(), config, folder)


def test_it_is_given_every_batch_and_completed_before_scales_are_folded():
    trained = run()
    dictionary: LastRows = trained.dictionary
    assert int(dictionary.seen) == 2000
    assert trained.metrics[-1]["seen"] > 1500
    assert trained.metrics[-1]["grad_norm"] == 0
    torch.testing.assert_close(dictionary.W_enc, dictionary.W_dec)  # equal in and out scales cancel in the encoder


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    whole = run(tmp_path / "whole").dictionary.state_dict()
    with pytest.raises((StopIteration, RuntimeError)):
        run(tmp_path / "killed", stop=12)
    again = run(tmp_path / "killed").dictionary.state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_fit_takes_it_by_import_path():
    code = unweave.fit(torch.randn(300, 6), arch="tests.training.test_absorb:LastRows", n_features=10, k=2, n_rows=1000)
    assert int(code.seen) >= 1000
