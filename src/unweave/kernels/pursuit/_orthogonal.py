"""The compiled loop of orthogonal matching pursuit by rows of the Gram matrix, and its growing Cholesky factor."""

from __future__ import annotations

import numpy as np
import torch

from unweave.kernels._jit import dot, dots, inline, jit, widen
from unweave.kernels.pursuit import dependence
from unweave.kernels.pursuit._scan import (
    find_maxima,
    largest,
    mask_of,
    n_blocks,
    noise_floor,
    strength_of,
    strike_out,
    worth_it,
)

_DEPENDENCE = dependence(torch.float32)


@jit
def _forward(L, b, n):
    """``L y = b`` for the lower triangle ``L[:n, :n]``; ``b`` becomes ``y``."""
    for i in range(n):
        total = b[i]
        for e in range(i):
            total -= L[i, e] * b[e]
        b[i] = total / L[i, i]


@jit
def _backward(L, y, n):
    """``L^T z = y``; ``y`` becomes ``z``."""
    for back in range(n):
        i = n - 1 - back
        y[i] /= L[i, i]
        for e in range(i):
            y[e] -= L[i, e] * y[i]


@jit
def combine(c, start, weights, A, which, n):
    """``c = start - sum of weights[e] A[which[e]]`` over ``e < n``, four rows of A at a time."""
    c[:] = start
    e = 0
    while e + 4 <= n:
        a0, a1, a2, a3 = A[which[e]], A[which[e + 1]], A[which[e + 2]], A[which[e + 3]]
        w0, w1 = np.float32(weights[e]), np.float32(weights[e + 1])
        w2, w3 = np.float32(weights[e + 2]), np.float32(weights[e + 3])
        for j in range(len(c)):
            c[j] -= w0 * widen(a0[j]) + w1 * widen(a1[j]) + w2 * widen(a2[j]) + w3 * widen(a3[j])
        e += 4
    while e < n:
        a, w = A[which[e]], np.float32(weights[e])
        for j in range(len(c)):
            c[j] -= w * widen(a[j])
        e += 1


@inline
def add_to_span(L, y, z, cross, n, square, inner):
    """A new row of the Cholesky factor of the picked atoms' Gram matrix, and of ``y`` in ``L y = W_picked x``.

    ``cross[:n]``: the new atom's products with the picked ones; ``square``: with itself; ``inner``: with the row.
    Returns whether it was added: not if the atom lies in the span already.
    """
    for e in range(n):
        z[e] = cross[e]
    _forward(L, z, n)
    outside, rest = np.float64(square), np.float64(inner)
    for e in range(n):
        outside -= z[e] * z[e]
        rest -= z[e] * y[e]
    fresh = outside > _DEPENDENCE * square
    if fresh:
        for e in range(n):
            L[n, e] = z[e]
        L[n, n] = np.sqrt(outside)
        y[n] = rest / L[n, n]
    return fresh


@inline
def solve(L, y, z, n):
    """``z``: the values of the picked atoms."""
    for e in range(n):
        z[e] = y[e]
    _backward(L, z, n)


@inline
def settle(x, W, found, L, y, z, n, residual, cross, values):
    """The final values. What rounding put into them shows in the residual, which a second solution takes out."""
    solve(L, y, z, n)
    combine(residual, x, z, W, found, n)
    dots(residual, W, found, 0, n, cross)
    for e in range(n):
        y[e] = cross[e]
    _forward(L, y, n)
    _backward(L, y, n)
    for e in range(n):
        values[e] = z[e] + y[e]


@jit
def pursue_orthogonally(lo, hi, X, W, C, G, rounded, signed, tolerance, indices, values, counts):
    """Rows ``lo`` to ``hi`` of ``C = X W^T``. ``rounded``: whether G is too coarse for the least squares."""
    m, d, width, mask = C.shape[1], X.shape[1], indices.shape[1], mask_of(signed)
    maxima, taken = np.empty(n_blocks(m), np.int32), np.empty(m, np.int32)
    c, residual = np.empty(m, np.float32), np.empty(d, np.float32)
    L, y, z, cross = np.zeros((width, width)), np.empty(width), np.empty(width), np.empty(width, np.float32)
    for b in range(lo, hi):
        c[:], residual[:] = C[b], X[b]
        found, floor = indices[b], noise_floor(X[b])
        find_maxima(c, mask, maxima)
        n = n_taken = 0
        while n < width:
            j = largest(c, mask, maxima)
            if not worth_it(strength_of(c[j], mask), floor, residual, tolerance):
                break
            taken[n_taken] = j
            n_taken += 1
            if rounded:
                dots(W[j], W, found, 0, n, cross)
            else:
                for e in range(n):
                    cross[e] = widen(G[found[e], j])
            if not add_to_span(L, y, z, cross, n, dot(W[j], W[j]), C[b, j]):
                strike_out(c, taken, n_taken, mask, maxima)
                continue
            found[n] = j
            n += 1
            solve(L, y, z, n)
            if tolerance >= 0:
                combine(residual, X[b], z, W, found, n)
            if n < width:
                combine(c, C[b], z, G, found, n)
                find_maxima(c, mask, maxima)
                strike_out(c, taken, n_taken, mask, maxima)
        counts[b] = n
        settle(X[b], W, found, L, y, z, n, residual, cross, values[b])
