"""Reconstruction error by dialogue: every one counts alike, however long it is.

``MSE = 1/(N d) sum_i 1/L_i sum_j ||y_ij - y_hat_ij||^2`` over the ``N`` dialogues and the ``L_i`` rows of each, as in
FAST (Li et al. 2025, ``sequence_mse``); ``special_mse`` is the same over the rows of the tokens that the chat template
wrote (and over the dialogues that have some). The headline numbers of the paper are base-2 logarithms of these. Both
are in the units of the activations, so they compare dictionaries of one model and site, not of several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.metrics import GroupedSums, Groups
from unweave.sources.chats import template_tokens

_NAMES = ("sequence_mse", "special_mse")


def row_weights(batch: ActivationBatch, marks: Mapping[str, Any]) -> Tensor:
    """``(n_rows, 2)`` float64: 1 over the rows of its item; and 1 over the marked ones, for them, 0 for the others.

    Args:
        batch: whole items. marks: ``provenance["chat"]`` of a source of dialogues.
    """
    item = batch.items.item_of_token[batch.row_token]
    marked = template_tokens(batch.items, marks)[batch.row_token].double()
    each = torch.stack([torch.ones_like(marked), marked], dim=1)
    sizes = torch.zeros(len(batch.items), 2, dtype=torch.float64).index_add_(0, item, each)
    return each / sizes[item].clamp_min(1)


class SequenceSums(GroupedSums):
    """Streaming sequence_mse and special_mse over pairs of rows with the weights of :func:`row_weights`.

    The weights of a dialogue add up to 1, so its rows may come in several parts.
    """

    def __init__(self, d: int, groups: Groups | None = None) -> None:
        super().__init__(groups)
        self.d = d
        self._errors = torch.zeros(self.groups.max_groups, 2, dtype=torch.float64)
        self._weights = torch.zeros(self.groups.max_groups, 2, dtype=torch.float64)

    def add(self, x: Tensor, x_hat: Tensor, weights: Tensor, document: Tensor | None = None) -> None:
        """Add ``(n, d)`` rows, their reconstructions and ``(n, 2)`` weights."""
        error = (x.cpu().double() - x_hat.cpu().double()).square().sum(1)
        group, weights = self._group(len(x), document), weights.double()
        self._errors.index_add_(0, group, weights * error[:, None])
        self._weights.index_add_(0, group, weights)

    def counts(self) -> np.ndarray:
        return self._weights[:, 0].numpy()

    def statistics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        errors, sizes = weights @ self._errors.numpy(), self.d * (weights @ self._weights.numpy())
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(sizes > 0, errors / sizes, np.nan)
        return dict(zip(_NAMES, values.T))
