"""The compiled loop of nonnegative orthogonal matching pursuit by rows of the Gram matrix."""

from __future__ import annotations

import numpy as np

from unweave.kernels._jit import inline, jit
from unweave.kernels.pursuit._orthogonal import add_to_span, combine, settle, solve
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


@inline
def _first_to_zero(now, goal, n):
    """``(place, share)``: whose value reaches zero first on the way from ``now`` to ``goal``, and how far that is.

    ``place`` is -1 where none does.
    """
    place, share = -1, np.inf
    for e in range(n):
        if goal[e] <= 0:
            until = now[e] / max(now[e] - goal[e], 1e-300)
            if until < share:
                place, share = e, until
    return place, share


@inline
def _span(found, now, n, G, inner, L, y, z, cross):
    """The Cholesky factor of ``found[:n]`` anew, and ``y``. Returns how many there are, which is n but for rounding."""
    size = 0
    for e in range(n):
        j = found[e]
        for i in range(size):
            cross[i] = G[found[i], j]
        if add_to_span(L, y, z, cross, size, G[j, j], inner[j]):
            found[size], now[size] = j, now[e]
            size += 1
    return size


@jit
def _nonnegative(found, n, G, inner, L, y, z, now, cross):
    """Nonnegative least squares on ``found[:n]`` from the values ``now``; how many are left, their values in ``now``.

    Solve for all; where a value is not positive go only as far as the first of them reaches zero, let go of that one,
    and solve again (Lawson and Hanson 1974).
    """
    solve(L, y, z, n)
    while True:
        out, share = _first_to_zero(now, z, n)
        if out < 0:
            break
        for e in range(n):
            now[e] = max(0.0, now[e] + share * (z[e] - now[e]))
        for e in range(out, n - 1):
            found[e], now[e] = found[e + 1], now[e + 1]
        n = _span(found, now, n - 1, G, inner, L, y, z, cross)
        solve(L, y, z, n)
    now[:n] = z[:n]
    return n


@jit
def pursue_nonnegatively(lo, hi, X, W, C, G, picks, tolerance, indices, values, counts):
    """Rows ``lo`` to ``hi`` of ``C = X W^T``, with a float32 Gram matrix ``G``."""
    m, d, width, mask = C.shape[1], X.shape[1], indices.shape[1], mask_of(False)
    maxima, struck = np.empty(n_blocks(m), np.int32), np.empty(m + width, np.int32)
    c, residual = np.empty(m, np.float32), np.empty(d, np.float32)
    L, y, z, now = np.zeros((width, width)), np.empty(width), np.empty(width), np.zeros(width)
    cross = np.empty(width, np.float32)
    for b in range(lo, hi):
        c[:], residual[:] = C[b], X[b]
        found, floor = indices[b], noise_floor(X[b])
        find_maxima(c, mask, maxima)
        n = n_struck = n_picks = 0
        while n < width and n_picks < picks:
            j = largest(c, mask, maxima)
            if not worth_it(strength_of(c[j], mask), floor, residual, tolerance):
                break
            for e in range(n):
                cross[e] = G[found[e], j]
            if not add_to_span(L, y, z, cross, n, G[j, j], C[b, j]):
                struck[n_struck] = j  # it could only trade places; of no use until the residual has changed
                n_struck += 1
                strike_out(c, struck, n_struck, mask, maxima)
                continue
            found[n], now[n] = j, 0.0
            n = _nonnegative(found, n + 1, G, C[b], L, y, z, now, cross)
            n_picks += 1
            combine(c, C[b], now, G, found, n)
            find_maxima(c, mask, maxima)
            struck[:n], n_struck = found[:n], n
            strike_out(c, struck, n_struck, mask, maxima)
            if tolerance >= 0:
                combine(residual, X[b], now, W, found, n)
        settle(X[b], W, found, L, y, z, n, residual, cross, values[b])
        kept = 0
        for e in range(n):  # of a value as small as rounding errors, the last solution may have changed the sign
            if values[b, e] > 0:
                found[kept], values[b, kept] = found[e], values[b, e]
                kept += 1
        counts[b] = kept
