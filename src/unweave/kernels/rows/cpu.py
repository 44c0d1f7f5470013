"""Passes over whole rows on a CPU, on the kernels' own threads.

torch would be as fast at each of them. But between two kernels its threads are asleep (see ``_jit.run``), and waking
them takes longer than the pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unweave.kernels._jit import array, jit, narrow, run, widen, write_row
from unweave.kernels.rows.reference import LEVELS, SMALLEST, Quantised

_PARTS = 16  # sums of so many stretches of rows, added up in order: the same whatever the number of threads


@jit
def _centred(lo, hi, rows, centre, x, norms, low):
    d, has_low = len(centre), len(low) > 0
    for b in range(lo, hi):
        row, out, total = rows[b], x[b], np.float32(0)
        for j in range(d):
            out[j] = row[j] - centre[j]
            total += out[j] * out[j]
        norms[b] = np.sqrt(total)
        if has_low:
            write_row(low[b], out)


@jit
def _weighted_sum(lo, hi, A, weights, parts):
    n, d = A.shape
    for part in range(lo, hi):
        out = parts[part]
        out[:] = np.float32(0)
        b, end = n * part // len(parts), n * (part + 1) // len(parts)
        while b + 4 <= end:
            a0, a1, a2, a3 = A[b], A[b + 1], A[b + 2], A[b + 3]
            v0, v1, v2, v3 = weights[b], weights[b + 1], weights[b + 2], weights[b + 3]
            for j in range(d):
                out[j] += v0 * widen(a0[j]) + v1 * widen(a1[j]) + v2 * widen(a2[j]) + v3 * widen(a3[j])
            b += 4
        while b < end:
            a, v = A[b], weights[b]
            for j in range(d):
                out[j] += v * widen(a[j])
            b += 1


@jit
def _quantised(lo, hi, A, columns, levels, scales, norms, lost, vanished):
    d = len(columns)
    for b in range(lo, hi):
        row, out, bits = A[b], levels[b], np.int32(0)
        for j in range(d):
            # As whole numbers, which are in the order of the sizes: three times as fast.
            bits = max(bits, np.float32(row[j] * columns[j]).view(np.int32) & 0x7FFFFFFF)
        largest = np.int32(bits).view(np.float32)
        fits = largest > np.float32(SMALLEST)
        scale = largest / np.float32(LEVELS) if fits else np.float32(0)
        inverse = np.float32(LEVELS) / largest if fits else np.float32(0)
        total, left, gone = np.float32(0), np.float32(0), np.float32(0)
        for j in range(d):
            value = row[j] * columns[j] * inverse
            level = np.rint(value)
            out[j] = np.int8(level)
            total += value * value
            left += (value - level) * (value - level)
            gone += value * value if level == 0 else np.float32(0)
        scales[b] = scale
        norms[b] = scale * np.sqrt(total) if fits else largest * np.sqrt(np.float32(d))
        lost[b] = scale * np.sqrt(left) if fits else norms[b]
        vanished[b] = scale * np.sqrt(gone) if fits else norms[b]


@jit
def _dequantised(lo, hi, sums, row_scales, column_scales, out):
    for b in range(lo, hi):
        row, to, scale = sums[b], out[b], row_scales[b]
        for j in range(len(column_scales)):
            to[j] = narrow(np.float32(row[j]) * (scale * column_scales[j]))


def centred(rows: Tensor, centre: Tensor, low: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`unweave.kernels.rows.reference.centred`, in float32."""
    x, norms = torch.empty(rows.shape), torch.empty(len(rows))
    copy = torch.empty(rows.shape if low else (0, 0), dtype=torch.bfloat16)
    run(_centred, len(rows), *map(array, (rows.contiguous(), centre, x, norms, copy)), work=4 * len(centre))
    return x, norms, copy if low else None


def weighted_sum(A: Tensor, weights: Tensor | None = None) -> Tensor:
    """As :func:`unweave.kernels.rows.reference.weighted_sum`, in float32; ``A`` may be bfloat16."""
    parts = torch.empty(_PARTS, A.shape[1])
    weights = torch.ones(len(A)) if weights is None else weights
    run(_weighted_sum, _PARTS, *map(array, (A.contiguous(), weights, parts)), work=A.numel() / _PARTS)
    return parts.sum(0)


def quantised(A: Tensor, columns: Tensor) -> Quantised:
    """As :func:`unweave.kernels.rows.reference.quantised`, in float32."""
    n, d = A.shape
    found = Quantised(torch.empty(n, d, dtype=torch.int8), *(torch.empty(n) for _ in range(4)))
    run(_quantised, n, *map(array, (A.contiguous(), columns, *found)), work=4 * d)
    return found


def dequantised(sums: Tensor, row_scales: Tensor, column_scales: Tensor, out: Tensor) -> Tensor:
    """As :func:`unweave.kernels.rows.reference.dequantised`; ``out`` is bfloat16."""
    run(_dequantised, len(sums), *map(array, (sums, row_scales, column_scales, out)), work=2 * sums.shape[1])
    return out
