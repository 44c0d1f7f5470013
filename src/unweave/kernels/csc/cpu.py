"""Sort the entries of a CSR pattern by feature: count, scan, scatter. One thread; the order is always the same."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels._jit import array, jit
from unweave.kernels.csc.reference import Columns
from unweave.kernels.pattern import Pattern


@jit
def _csc(offsets, indices, starts, sorted_rows, order):
    n_features = len(starts) - 1
    for e in range(len(indices)):
        starts[indices[e] + 1] += 1
    for f in range(n_features):
        starts[f + 1] += starts[f]
    # While scattering, starts[f] runs to the end of f; afterwards everything has moved up by one place.
    for b in range(len(offsets) - 1):
        for e in range(offsets[b], offsets[b + 1]):
            f = indices[e]
            at = starts[f]
            starts[f] = at + 1
            sorted_rows[at] = b
            order[at] = e
    for f in range(n_features, 0, -1):
        starts[f] = starts[f - 1]
    starts[0] = 0


@jit
def _counts(indices, values, out):
    for e in range(len(indices)):
        out[indices[e]] += values[e] != 0


def counts(indices: Tensor, values: Tensor, n_features: int) -> Tensor:
    """As :func:`unweave.kernels.csc.reference.counts`, for float32 values."""
    out = torch.zeros(n_features, dtype=torch.long)
    _counts(array(indices), array(values), array(out))
    return out


def csc(pattern: Pattern) -> Columns:
    starts = torch.zeros(pattern.n_features + 1, dtype=torch.long)
    sorted_rows, order = torch.empty(2, len(pattern.indices), dtype=torch.long)
    _csc(*map(array, (pattern.offsets, pattern.indices, starts, sorted_rows, order)))
    return Columns(starts, sorted_rows, order)
