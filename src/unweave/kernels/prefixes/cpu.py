"""Nested reconstructions on a CPU: a row's entries are added group by group to one running reconstruction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unweave.kernels._jit import array, dot, jit, run, widen
from unweave.kernels.pattern import Pattern
from unweave.kernels.prefixes.reference import group_of


@jit
def _decode_prefixes(
    lo, hi, offsets, indices, groups, values, W, bias, target, scales, errors, grads, squares
):  # fmt: skip
    d, n_groups = len(bias), len(scales)
    running = np.empty(d, np.float32)
    for b in range(lo, hi):
        start, end = offsets[b], offsets[b + 1]
        for j in range(d):
            running[j] = bias[j] - target[b, j]
        for g in range(n_groups):
            for e in range(start, end):
                if groups[e] == g:
                    w, v = W[indices[e]], values[e]
                    for j in range(d):
                        running[j] += v * widen(w[j])
            row, scale = errors[b, g], scales[g]
            squares[b, g] = dot(running, running)
            for j in range(d):
                row[j] = scale * running[j]
        for g in range(n_groups - 2, -1, -1):  # a feature answers for its own prefix and every longer one
            row, longer = errors[b, g], errors[b, g + 1]
            for j in range(d):
                row[j] += longer[j]
        for e in range(start, end):
            grads[e] = dot(errors[b, groups[e]], W[indices[e]])


def decode_prefixes(
    pattern: Pattern, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, ends: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`unweave.kernels.prefixes.reference.decode_prefixes`, in float32; ``W_dec`` may be bfloat16."""
    n, d = target.shape
    errors, squares = torch.empty(n, len(ends), d), torch.empty(n, len(ends))
    grads = torch.empty(len(values))
    groups = group_of(pattern, ends)
    read = map(array, (pattern.offsets, pattern.indices, groups, values, W_dec, b_dec, target, scales))
    work = (2 * len(values) / max(1, n) + 4 * len(ends)) * d
    run(_decode_prefixes, n, *read, *map(array, (errors, grads, squares)), work=work)
    return errors, grads, squares
