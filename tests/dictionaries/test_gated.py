"""Gated: who teaches what, when it is a JumpReLU, and that its values are not shrunk."""

from __future__ import annotations

import pytest
import torch
from tests.dictionaries.toys import planted
from torch import Tensor

import unweave.training
from unweave.dictionaries import Gated, TrainingBatch, build
from unweave.metrics import fvu


def made(**options) -> tuple[Gated, Tensor]:
    """A dictionary with all parameters random, and 64 rows."""
    torch.manual_seed(0)
    dictionary = build("gated", 12, 40, **options).double().train()
    assert isinstance(dictionary, Gated)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return dictionary, torch.randn(64, 12, dtype=torch.float64)


def test_the_loss_is_the_equation_written_densely() -> None:
    dictionary, x = made()
    loss = dictionary.loss(TrainingBatch(x, x))
    loss.total.backward()
    ours = {name: p.grad.clone() for name, p in dictionary.named_parameters() if p.grad is not None}
    dictionary.zero_grad()
    pi = (x - dictionary.b_dec) @ dictionary.W_enc.T
    gate = (pi + dictionary.b_enc).relu()
    z = (gate > 0) * (dictionary.log_magnitude.exp() * pi + dictionary.b_mag).relu()
    frozen = gate @ dictionary.W_dec.detach() + dictionary.b_dec.detach()
    total = (x - z @ dictionary.W_dec - dictionary.b_dec).square().sum(1).mean()
    total = total + 0.04 * gate.sum(1).mean() + (x - frozen).square().sum(1).mean()
    total.backward()
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(loss.code.dense(), z.detach())
    for name, parameter in dictionary.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_gate_teaches_the_decoder_nothing() -> None:
    """With no magnitude (b_mag far below 0) only the gate's own reconstruction is left of the loss."""
    dictionary, x = made()
    with torch.no_grad():
        dictionary.b_mag.fill_(-100.0)
    dictionary.loss(TrainingBatch(x, x)).total.backward()
    assert dictionary.W_dec.grad is not None
    assert float(dictionary.W_dec.grad.abs().max()) == 0
    assert float(dictionary.W_enc.grad.abs().sum()) > 0


def test_it_is_a_jumprelu_whose_thresholds_follow_from_its_biases() -> None:
    """``exp(r) pi + b_mag`` where ``pi > -b_enc``: a threshold at ``b_mag - exp(r) b_enc``, where that is positive."""
    dictionary, x = made()
    gain = dictionary.log_magnitude.detach().exp()
    with torch.no_grad():
        dictionary.b_mag.copy_(gain * dictionary.b_enc + torch.rand(40, dtype=torch.float64) + 0.05)
    other = build("jumprelu", 12, 40, target_l0=4.0).double()
    with torch.no_grad():
        other.W_enc.copy_(gain[:, None] * dictionary.W_enc)
        other.b_enc.copy_(dictionary.b_mag)
        other.log_threshold.copy_((dictionary.b_mag - gain * dictionary.b_enc).log())
        for name in ("W_dec", "b_dec"):
            getattr(other, name).copy_(getattr(dictionary, name))
        torch.testing.assert_close(dictionary.eval().encode(x).dense(), other.eval().encode(x).dense())
        assert dictionary.encode(x).nnz > 100


# Over seeds 0 to 4: reconstructions have 0.93 to 0.94 of the rows' norm and FVU 0.059 to 0.063 at L0 3.2 to 3.3, where
# ReLU with an L1 penalty has 0.70 to 0.72 and 0.131 to 0.139 at L0 3.6 to 3.7.
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_values_are_not_shrunk_as_those_of_l1(seed: int) -> None:
    _, rows = planted(seed, n=4000)
    settings = {"n_features": 64, "n_rows": 300 * 256, "batch_size": 256, "seed": seed}
    gated = unweave.training.fit(rows, "gated", sparsity_coefficient=0.3, **settings)
    relu = unweave.training.fit(rows, "relu", variant="standard", l1_coefficient=0.3, **settings)
    with torch.no_grad():
        lengths = [float((d(rows).norm(dim=1) / rows.norm(dim=1)).mean()) for d in (gated, relu)]
        l0 = [float(d.encode(rows).l0().float().mean()) for d in (gated, relu)]
        assert lengths[0] > 0.85 > 0.75 > lengths[1]
        assert fvu(rows, gated(rows)) < 0.7 * fvu(rows, relu(rows))
        assert l0[0] < l0[1]
