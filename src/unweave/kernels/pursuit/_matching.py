"""The compiled loop of matching pursuit by rows of the Gram matrix."""

from __future__ import annotations

import numpy as np

from unweave.kernels._jit import inline, jit
from unweave.kernels.pursuit._scan import (
    find_maxima,
    largest,
    mask_of,
    n_blocks,
    noise_floor,
    strength_of,
    strike_out,
    take_off,
    take_off_two,
    worth_it,
)


@inline
def enter(found, values, n, j, v):
    """Add ``v`` to the entry of ``j``, one of ``found[:n]`` or a new one; how many entries there are now."""
    slot = 0
    while slot < n and found[slot] != j:
        slot += 1
    if slot == n:
        found[slot], values[slot] = j, v
        return n + 1
    values[slot] += v
    return n


@inline
def subtract(residual, v, atom):
    for j in range(len(residual)):
        residual[j] -= v * atom[j]


@jit
def pursue(lo, hi, X, W, C, G, k, signed, distinct, until_repeat, tolerance, indices, values, counts, trail):
    """Rows ``lo`` to ``hi`` of ``C = X W^T``, which is used up, in pairs. A trail of no columns is not written."""
    mask, blocks = mask_of(signed), n_blocks(C.shape[1])
    maxima, residual = np.empty((2, blocks), np.int32), np.empty((2, X.shape[1]), np.float32)
    floor, active = np.empty(2, np.float32), np.empty(2, np.bool_)
    at, amount = np.empty(2, np.int64), np.empty(2, np.float32)
    noted = trail.shape[1] > 0
    for b in range(lo, hi, 2):
        for r in range(2):
            active[r] = b + r < hi
            if active[r]:
                counts[b + r] = 0
                residual[r] = X[b + r]
                floor[r] = noise_floor(X[b + r])
                find_maxima(C[b + r], mask, maxima[r])
        for t in range(k):
            for r in range(2):
                if active[r]:
                    i = b + r
                    j = largest(C[i], mask, maxima[r])
                    v = C[i, j]
                    active[r] = worth_it(strength_of(v, mask), floor[r], residual[r], tolerance)
                    if active[r]:
                        at[r], amount[r] = j, v
                        before = counts[i]
                        counts[i] = enter(indices[i], values[i], before, j, v)
                        if noted:
                            trail[i, t] = j
                        if tolerance >= 0:
                            subtract(residual[r], v, W[j])
                        if until_repeat and counts[i] == before:
                            active[r] = False
            if t + 1 == k or not (active[0] or active[1]):
                break
            if active[0] and active[1]:
                take_off_two(C[b], amount[0], G[at[0]], C[b + 1], amount[1], G[at[1]], mask, maxima)
            else:
                r = 0 if active[0] else 1
                take_off(C[b + r], amount[r], G[at[r]], mask, maxima[r])
            if distinct:
                for r in range(2):
                    if active[r]:
                        strike_out(C[b + r], indices[b + r], counts[b + r], mask, maxima[r])
