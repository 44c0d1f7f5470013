"""The end of a training step without autograd: sum each row's gradient, then step the row."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.adam.reference import AdamStep, Rows, adam_rows, project
from unweave.kernels.csc.reference import Columns
from unweave.kernels.gradients.reference import Extra, sum_outer


@torch.no_grad()
def update_rows(
    rows: Rows, columns: Columns, weights: Tensor, A: Tensor, step: AdamStep, extra: Extra | None = None
) -> Tensor:
    """Step ``rows`` with the gradient ``G[f] = sum over the entries of f of weight * A[row]``
    plus what is extra; the gradient is not kept.

    Returns:
        ``(n_features,)``, the squared norm of each row's gradient (after projection).
    """
    G = project(rows, sum_outer(columns, weights, A, rows.W, extra))
    adam_rows(rows, G, step)
    return G.square().sum(1)
