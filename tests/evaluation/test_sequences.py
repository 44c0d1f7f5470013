"""sequence_mse and special_mse: test (e) of FAST, and what evaluate does with them."""

from __future__ import annotations

import math

import pytest
import torch

from unweave.batch import ActivationBatch, Items
from unweave.evaluation import METRICS, evaluate
from unweave.evaluation.sequences import SequenceSums, row_weights
from unweave.metrics import Groups
from unweave.sources import Documents, LanguageModel, TextSource
from unweave.sources.chats import template_tokens

MARKS = {"special": [90, 91], "roles": [[7]]}


def unequal(d: int = 5) -> tuple[ActivationBatch, torch.Tensor]:
    """Three sequences of 4, 30 and 9 tokens, with a special token or two each but the last."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 30, 9])
    tokens = torch.randint(0, 50, (43,), generator=generator, dtype=torch.int32)
    tokens[torch.tensor([0, 4, 20])] = 90
    tokens[torch.tensor([1, 21, 33])] = 7  # two behind a special token, one not
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    items = Items(tokens, offsets, torch.arange(3), torch.zeros(3, dtype=torch.int32))
    x = torch.randn(43, d, generator=generator, dtype=torch.float64)
    batch = ActivationBatch(x, x, items, torch.arange(43))
    noise = torch.randn(43, d, generator=generator, dtype=torch.float64)
    return batch, x + noise * torch.linspace(0.1, 3, 43)[:, None]


def test_it_is_the_formula_and_not_the_mean_over_tokens():
    batch, x_hat = unequal()
    errors = (batch.input - x_hat).square()
    parts = errors.split([4, 30, 9])
    sums = SequenceSums(5)
    sums.add(batch.input, x_hat, row_weights(batch, MARKS))
    values = sums.values()
    by_hand = sum(float(part.sum()) / len(part) for part in parts) / (3 * 5)
    assert math.isclose(values["sequence_mse"], by_hand, rel_tol=1e-12)
    assert abs(values["sequence_mse"] - float(errors.mean())) > 0.1 * by_hand
    marked = [[0, 1], [4, 20, 21]]  # the third sequence has none, and does not count
    special = sum(float(errors[rows].sum()) / len(rows) for rows in marked) / (2 * 5)
    assert math.isclose(values["special_mse"], special, rel_tol=1e-12)
    equal = SequenceSums(5)
    equal.add(batch.input[:4], x_hat[:4], torch.full((4, 2), 0.25))
    assert math.isclose(equal.values()["sequence_mse"], float(errors[:4].mean()), rel_tol=1e-12)


def test_parts_and_groups_add_up():
    batch, x_hat = unequal()
    weights, document = row_weights(batch, MARKS), batch.meta.document
    whole, parts = SequenceSums(5), SequenceSums(5, Groups(8))
    whole.add(batch.input, x_hat, weights)
    for at in torch.arange(43).split(7):  # sequences come apart
        parts.add(batch.input[at], x_hat[at], weights[at], document[at])
    for name, value in whole.values().items():
        assert math.isclose(parts.values()[name], value, rel_tol=1e-12)
    assert math.isnan(SequenceSums(5).values()["special_mse"])


@pytest.fixture(scope="module")
def chat_source(chat_model, chats):
    model = LanguageModel.load(str(chat_model), dtype="float32", device="cpu")
    return TextSource(model, Documents.from_chats(chats), "layers.1", split="all", context_size=64)


def test_evaluating_on_dialogues_measures_both_beside_the_rivals(chat_source, known):
    """A dictionary that is off by 1 at every coordinate of ordinary tokens, and by 2 at the template's."""
    marks = chat_source.provenance["chat"]
    special = torch.cat([batch.input[template_tokens(batch.items, marks)] for batch in chat_source.batches()])

    def off(rows):
        is_special = (rows[:, None, :4] == special[None, :, :4]).all(2).any(1)
        return rows + torch.where(is_special, 2.0, 1.0)[:, None]

    found = evaluate(known(32, off), chat_source, n_rows=1000, n_loss_tokens=100, n_bootstrap=50, progress=False)
    assert found["special_mse"] == pytest.approx(4, rel=1e-5)
    assert 1 < found["sequence_mse"] < 2
    assert found.metrics["sequence_mse"].low < found["sequence_mse"] < found.metrics["sequence_mse"].high
    assert all({"sequence_mse", "special_mse"} <= metrics.keys() for metrics in found.baselines.values())
    assert {"sequence_mse", "special_mse"} <= METRICS.keys()


def test_on_texts_they_are_not_measured(text_source, model, known):
    found = evaluate(known(32, lambda z: z), text_source(model), n_rows=300, n_loss_tokens=0, progress=False)
    assert "sequence_mse" not in found.metrics
