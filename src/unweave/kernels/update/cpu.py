"""Row gradients and Adam on a CPU, fused: a gradient never leaves the cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unweave.kernels._jit import add_rows, array, dot, jit, run
from unweave.kernels.adam.cpu import arguments, project_row, step_row
from unweave.kernels.adam.reference import AdamStep, Rows
from unweave.kernels.csc.reference import Columns
from unweave.kernels.gradients.cpu import extra_arrays, start_row
from unweave.kernels.gradients.reference import Extra


@jit
def _update_rows(
    lo, hi, starts, order, rows, weights, A, squares, at, more, pull,
    W, first, second, beta1, beta2, step_size, correction, eps, unit_norm, shadow,
):  # fmt: skip
    g, one, has_shadow = np.empty(W.shape[1], np.float32), np.float32(1), len(shadow) > 0
    nothing = np.empty(0, np.int16)
    for f in range(lo, hi):
        start_row(g, f, W, at, more, pull)
        add_rows(g, weights, order, rows, A, starts[f], starts[f + 1])
        project_row(W[f], g, unit_norm)
        squares[f] = dot(g, g)
        copy = shadow[f] if has_shadow else nothing
        step_row(W[f], g, first[f], second[f], one, beta1, beta2, step_size, correction, eps, unit_norm, copy)


def update_rows(
    rows: Rows, columns: Columns, weights: Tensor, A: Tensor, step: AdamStep, extra: Extra | None = None
) -> Tensor:
    """As :func:`unweave.kernels.update.reference.update_rows`, in float32."""
    squares = torch.empty(len(rows.W))
    read = map(array, (columns.starts, columns.order, columns.rows, weights, A, squares))
    work = (8 + len(weights) / len(rows.W)) * A.shape[1]
    run(_update_rows, len(rows.W), *read, *extra_arrays(extra), *arguments(rows, step), work=work)
    return squares
