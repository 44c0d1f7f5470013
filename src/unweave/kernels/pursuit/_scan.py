"""Where a row of correlations is largest, found while the row is being updated.

A row is cut into blocks, and the largest of each block is kept (``maxima``): the pass that takes a pick off the row
leaves new maxima behind, and the next pick is found from those and one block.

The search compares bits instead of floats. As integers, the bits of positive floats are in the same order as the
floats, and those of negative floats are below zero. LLVM vectorises the maximum of integers, which it does not do for
floats, and a NaN cannot derail the search. ``mask`` (see :func:`mask_of`) takes the sign bit away where picks are by
absolute correlation.
"""

from __future__ import annotations

import numpy as np
import torch

from unweave.kernels._jit import dot, inline, jit, widen
from unweave.kernels.pursuit import noise

_BLOCK = 256  # few enough to look through again, many enough to pay for the look
_NOISE = np.float32(noise(torch.float32))


@inline
def mask_of(signed):
    return np.int32(0x7FFFFFFF) if signed else np.int32(-1)


@inline
def _bits(value, mask):
    return np.int32(np.float32(value).view(np.int32) & mask)


@inline
def strength_of(value, mask):
    """What a correlation is picked for: itself, or its absolute value."""
    return _bits(value, mask).view(np.float32)


@inline
def n_blocks(m):
    return (m + _BLOCK - 1) // _BLOCK


@inline
def _largest_of(part, mask):
    best = np.int32(0)
    for j in range(len(part)):
        best = max(best, _bits(part[j], mask))
    return best


@jit
def find_maxima(c, mask, maxima):
    """``maxima[q]``: the bits of the largest of ``c`` in block q; 0 where none is positive."""
    for q in range(len(maxima)):
        maxima[q] = _largest_of(c[q * _BLOCK : (q + 1) * _BLOCK], mask)


@jit
def largest(c, mask, maxima):
    """Where the largest of ``c`` is, the first among equals."""
    best, n = np.int32(0), len(maxima)
    for q in range(n):
        best = max(best, maxima[q])
    block = np.int32(n - 1)
    for q in range(n):
        block = min(block, np.int32(q) if maxima[q] == best else np.int32(n))
    start = np.int64(block) * _BLOCK
    part = c[start : start + _BLOCK]
    at = np.int32(len(part) - 1)
    for j in range(len(part)):
        at = min(at, np.int32(j) if _bits(part[j], mask) == best else np.int32(_BLOCK))
    return start + at


@jit
def take_off(c, v, g, mask, maxima):
    """``c -= v g``, and the maxima of what is left, in one pass."""
    for q in range(len(maxima)):
        part, row = c[q * _BLOCK : (q + 1) * _BLOCK], g[q * _BLOCK : (q + 1) * _BLOCK]
        best = np.int32(0)
        for j in range(len(part)):
            left = part[j] - v * widen(row[j])
            part[j] = left
            best = max(best, _bits(left, mask))
        maxima[q] = best


@jit
def take_off_two(c0, v0, g0, c1, v1, g1, mask, maxima):
    """:func:`take_off` for two rows at once: memory is the limit, and two rows of G come in together."""
    for q in range(len(maxima[0])):
        lo, hi = q * _BLOCK, (q + 1) * _BLOCK
        part0, row0, part1, row1 = c0[lo:hi], g0[lo:hi], c1[lo:hi], g1[lo:hi]
        best0 = best1 = np.int32(0)
        for j in range(len(part0)):
            left0, left1 = part0[j] - v0 * widen(row0[j]), part1[j] - v1 * widen(row1[j])
            part0[j], part1[j] = left0, left1
            best0, best1 = max(best0, _bits(left0, mask)), max(best1, _bits(left1, mask))
        maxima[0, q], maxima[1, q] = best0, best1


@jit
def strike_out(c, taken, n, mask, maxima):
    """Zero the correlations of ``taken[:n]``: never picked again."""
    for e in range(n):
        j, q = taken[e], taken[e] // _BLOCK
        was = _bits(c[j], mask)
        c[j] = np.float32(0)
        if was == maxima[q]:
            maxima[q] = _largest_of(c[q * _BLOCK : (q + 1) * _BLOCK], mask)


@inline
def noise_floor(x):
    """The correlation with row ``x`` that is taken for zero."""
    return _NOISE * np.sqrt(dot(x, x))


@inline
def worth_it(best, floor, residual, tolerance):
    """Whether to pick on: the correlation is more than noise, the residual more than the tolerance (if any: >= 0)."""
    worth = best > floor
    if worth and tolerance >= 0:
        worth = np.sqrt(dot(residual, residual)) > tolerance
    return worth
