"""Weights that lie in memory column by column, or that ask for no gradient."""

from __future__ import annotations

import torch
from torch import nn

from unweave.dictionaries import TopK
from unweave.testing import check_architecture


class Transposed(TopK):
    """TopK with decoder weights that lie column by column, as a transpose or a QR factor does."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.W_dec = nn.Parameter(self.W_dec.detach().T.contiguous().T)

    def loss(self, batch):  # overridden, so autograd and torch's Adam do the steps
        return super().loss(batch)


def test_a_resumed_training_has_the_same_bits_whatever_the_layout():
    """Fused Adam pairs weights and moments by their place in memory, and files give moments back row by row."""
    assert not Transposed(Transposed.Config(d_in=4, d_out=4, n_features=9, k=2)).W_dec.is_contiguous()
    check_architecture(Transposed, only=["resumes_with_the_same_bits"])


class Lookup(TopK):
    """Learns by being handed rows, and has no parameter that asks for a gradient."""

    learns_by_gradient = False

    def __init__(self, config) -> None:
        super().__init__(config)
        self.requires_grad_(False)

    def absorb(self, batch):
        self.b_dec.lerp_(batch.target.mean(0), 0.1)
        with torch.enable_grad():
            return self.loss(batch)


def test_nothing_needs_to_ask_for_a_gradient_where_none_is_taken():
    check_architecture(Lookup, only=["learns_an_easy_problem", "resumes_with_the_same_bits"])
