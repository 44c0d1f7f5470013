"""Row gradients on a CPU: each feature sums over its own entries, so no two threads write the same row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unweave.kernels._jit import add_rows, array, dots, inline, jit, run
from unweave.kernels.csc.reference import Columns
from unweave.kernels.gradients.reference import Extra
from unweave.kernels.pattern import Pattern


@jit
def _gather_dot(lo, hi, offsets, indices, A, W, out):
    for b in range(lo, hi):
        dots(A[b], W, indices, offsets[b], offsets[b + 1], out)


@jit
def _sum_outer(lo, hi, starts, order, rows, weights, A, W, at, more, pull, out):
    for f in range(lo, hi):
        start_row(out[f], f, W, at, more, pull)
        add_rows(out[f], weights, order, rows, A, starts[f], starts[f + 1])


@inline
def start_row(g, f, W, at, more, pull):
    """What a row gradient holds before its entries are added; empty arrays stand for nothing."""
    if len(at) > 0 and at[f] >= 0:
        g[:] = more[at[f]]
    else:
        g[:] = np.float32(0)
    if len(pull) > 0:
        w, share = W[f], pull[f]
        for j in range(len(g)):
            g[j] += share * w[j]


@jit
def _sum_over(lo, hi, starts, order, weights, out):
    for f in range(lo, hi):
        total = np.float32(0)
        for e in range(starts[f], starts[f + 1]):
            total += weights[order[e]]
        out[f] = total


@jit
def _norm_bound(starts, order, rows, weights, lengths, more):
    total = 0.0
    for f in range(len(starts) - 1):
        each = more[f] if len(more) > 0 else np.float32(0)
        for e in range(starts[f], starts[f + 1]):
            each += abs(weights[order[e]]) * lengths[rows[e]]
        total += each * each
    return total


def gather_dot(pattern: Pattern, A: Tensor, W: Tensor) -> Tensor:
    """``out[e] = A[row of e] . W[feature of e]``, shape ``(nnz,)``."""
    out = torch.empty(len(pattern.indices))
    work = len(out) / max(1, pattern.n_rows) * A.shape[1]
    run(_gather_dot, pattern.n_rows, *map(array, (pattern.offsets, pattern.indices, A, W, out)), work=work)
    return out


def sum_outer(
    columns: Columns,
    weights: Tensor,
    A: Tensor,
    W: Tensor | None = None,
    extra: Extra | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[f] = sum over the entries of f of weight * A[row]``, plus what is extra; shape ``(n_features, d)``."""
    if out is None:
        out = torch.empty(len(columns.starts) - 1, A.shape[1])
    read = map(array, (columns.starts, columns.order, columns.rows, weights, A, out if W is None else W))
    run(_sum_outer, len(out), *read, *extra_arrays(extra), array(out), work=(1 + len(weights) / len(out)) * A.shape[1])
    return out


def extra_arrays(extra: Extra | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``at``, ``rows`` and ``pull``, empty where there are none."""
    at, rows, pull = (None, None, None) if extra is None else extra
    return (
        np.empty(0, np.int64) if at is None else array(at),
        np.empty((0, 0), np.float32) if rows is None else array(rows),
        np.empty(0, np.float32) if pull is None else array(pull),
    )


def sum_over(columns: Columns, weights: Tensor) -> Tensor:
    """``out[f] = sum of the weights of f``, shape ``(n_features,)``."""
    out = torch.empty(len(columns.starts) - 1)
    work = 1 + len(weights) / len(out)
    run(_sum_over, len(out), *map(array, (columns.starts, columns.order, weights, out)), work=work)
    return out


def norm_bound(columns: Columns, weights: Tensor, lengths: Tensor, more: Tensor | None = None) -> Tensor:
    """As :func:`unweave.kernels.gradients.reference.norm_bound`; one thread, for it is one short pass."""
    more_ = np.empty(0, np.float32) if more is None else array(more)
    read = map(array, (columns.starts, columns.order, columns.rows, weights, lengths))
    return torch.tensor(_norm_bound(*read, more_))
