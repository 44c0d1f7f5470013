"""The compiled loop of either pursuit that picks among a few candidates of each row for as long as they will do."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from unweave.kernels._jit import dot, dots, jit
from unweave.kernels.pursuit._matching import enter, subtract
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


class Progress(NamedTuple):
    """How far each row has come; arrays that go on from call to call."""

    residual: Any  # (n, d)
    indices: Any  # (n, width)
    values: Any  # (n, width)
    counts: Any  # (n,), entries
    picks: Any  # (n,), of an atom picked before too
    proven: Any  # (n,), picks that no atom beyond the candidates can have been better than
    done: Any  # (n,)
    factors: Any  # (n, width, width), of the picked atoms' Gram matrix; of size 0 unless orthogonal
    projections: Any  # (n, width), the row in the basis that goes with the factor


@jit
def pursue_screened(
    lo, hi, active, X, W, scores, candidates, k, signed, distinct, orthogonal, tolerance, caution, progress
):
    """Rows ``active[lo:hi]``, as far as their candidates go: ``scores`` are the residuals' products with them."""
    m, d, mask, width = scores.shape[1], X.shape[1], mask_of(signed), progress.indices.shape[1]
    maxima, taken = np.empty(n_blocks(m), np.int32), np.empty(m, np.int32)
    c, before = np.empty(m, np.float32), np.empty(d, np.float32)
    z, cross = np.empty(width), np.empty(width, np.float32)
    counts, picks, done = progress.counts, progress.picks, progress.done
    for b in range(lo, hi):
        i = active[b]
        near, residual = candidates[b], progress.residual[i]
        found, values = progress.indices[i], progress.values[i]
        L, y = progress.factors[i], progress.projections[i]
        floor = noise_floor(X[i])
        c[:], before[:] = scores[b], residual
        weakest = np.float32(np.inf)  # no atom beyond the candidates has a larger score
        for j in range(m):
            weakest = min(weakest, strength_of(c[j], mask))
        if m == len(W):
            weakest = -np.float32(np.inf)
        find_maxima(c, mask, maxima)
        n_taken, moved = 0, np.float32(0)
        while True:
            j = largest(c, mask, maxima)
            v = c[j]
            strength = strength_of(v, mask)
            if moved > 0 and strength <= weakest + caution * moved:
                break
            done[i] = not worth_it(strength, floor, residual, tolerance)
            if done[i]:
                break
            atom, n = W[near[j]], counts[i]
            taken[n_taken] = j
            n_taken += 1
            if orthogonal:
                dots(atom, W, found, 0, n, cross)
                if not add_to_span(L, y, z, cross, n, dot(atom, atom), dot(atom, X[i])):
                    strike_out(c, taken, n_taken, mask, maxima)
                    continue
                found[n] = near[j]
                counts[i] += 1
                solve(L, y, z, n + 1)
                combine(residual, X[i], z, W, found, n + 1)
            else:
                counts[i] = enter(found, values, n, near[j], v)
                subtract(residual, v, atom)
            picks[i] += 1
            # Scores move by no more than the residual does: no atom beyond the candidates can have been better.
            progress.proven[i] += moved == 0 or strength >= weakest + moved
            done[i] = picks[i] == k or (distinct and counts[i] == width)
            if done[i]:
                break
            moved = np.float32(0)
            for e in range(d):
                moved += (residual[e] - before[e]) * (residual[e] - before[e])
            moved = max(np.sqrt(moved), np.float32(1e-30))
            dots(residual, W, near, 0, m, c)
            find_maxima(c, mask, maxima)
            if distinct:
                strike_out(c, taken, n_taken, mask, maxima)
        if done[i] and orthogonal:
            settle(X[i], W, found, L, y, z, counts[i], residual, cross, values)
