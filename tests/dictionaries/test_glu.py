"""GLU encoders: the equation, its gradients, and what the gate adds to a plain encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.dictionaries import TrainingBatch, build
from unweave.errors import UnweaveError

ACTIVATIONS: list[dict[str, Any]] = [{"activation": "topk", "k": 4}, {"activation": "relu"}]
each = pytest.mark.parametrize("options", ACTIVATIONS, ids=["topk", "relu"])


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    dictionary = build("glu", 8, 24, **options).double()
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return dictionary


def rows(n: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(dictionary: Any, x: Tensor) -> Tensor:
    centred = x - dictionary.b_dec
    u = centred @ dictionary.W_enc.T + dictionary.b_enc
    u = u * torch.sigmoid(centred @ dictionary.W_gate.T + dictionary.b_gate)
    if dictionary.config.activation == "relu":
        return u.relu()
    return u.relu() * torch.zeros_like(u).scatter(1, u.topk(4, 1).indices, 1.0)


@each
def test_codes_loss_and_gradients_equal_a_dense_rewriting(options: dict[str, Any]) -> None:
    dictionary, x = made(**options), rows()
    z = dense(dictionary, x)
    torch.testing.assert_close(dictionary.encode(x).dense(), z)
    total = (x - z @ dictionary.W_dec - dictionary.b_dec).square().sum(1).mean()
    if options["activation"] == "relu":
        total = total + 0.04 * (z * dictionary.W_dec.norm(dim=1)).sum(1).mean()
    ours = dictionary.loss(TrainingBatch(x, x)).total
    torch.testing.assert_close(ours, total)
    parameters = list(dictionary.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(total, parameters)):
        torch.testing.assert_close(a, b)


@each
@torch.no_grad()
def test_the_scale_of_training_folds_exactly(options: dict[str, Any]) -> None:
    dictionary, x = made(**options), rows()
    code, expected = dictionary.encode(0.3 * x).dense() / 0.3, dictionary(0.3 * x) / 0.3
    dictionary.fold_scale(0.3)
    torch.testing.assert_close(dictionary.encode(x).dense(), code)
    torch.testing.assert_close(dictionary(x), expected)


def test_the_gate_starts_at_a_half() -> None:
    torch.manual_seed(0)
    dictionary, x = build("glu", 8, 24, k=4), rows().float()
    torch.manual_seed(0)
    plain = build("topk", 8, 24, k=4)
    with torch.no_grad():
        torch.testing.assert_close(2 * dictionary.encode(x).dense(), plain.encode(x).dense())
    with pytest.raises(UnweaveError, match="k must be at most"):
        build("glu", 8, 24, k=25)
