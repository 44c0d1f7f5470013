"""The pieces that the CPU's selection loops are put together from."""

from __future__ import annotations

import numpy as np

from unweave.kernels._jit import inline, jit, widen

MIN_GROUPS = 128
LOWEST = np.float32(-np.inf)
HUGE = np.float32(1e38)  # twice that is still a number
_BY_VALUE = 24  # rounds of bisection: enough for scores of like size


@inline
def group_maxima(p, shift, signed, rounding, maxima):
    """``maxima[g]`` is the largest score among the entries ``g, g + G, g + 2G, ...``.

    With ``rounding``, the share of itself that a score may have lost, the largest that one may have been; not signed.
    """
    m, n_groups = len(p), len(maxima)
    maxima[:] = LOWEST
    at = 0
    while at < m:
        width = min(n_groups, m - at)
        part, offset = p[at : at + width], shift[at : at + width]
        if signed:
            for j in range(width):
                maxima[j] = max(maxima[j], abs(widen(part[j]) + offset[j]))
        elif rounding > 0:
            for j in range(width):
                raw = widen(part[j])
                maxima[j] = max(maxima[j], raw + rounding * abs(raw) + offset[j])
        else:
            for j in range(width):
                maxima[j] = max(maxima[j], widen(part[j]) + offset[j])
        at += n_groups


@jit
def _key(score):
    """An integer in the order of the scores."""
    bits = np.int64(np.float32(score).view(np.int32))
    return bits if bits >= 0 else bits ^ 0x7FFFFFFF


@jit
def _middle(low, high, round_):
    """Between two scores: by value at first, which is quick; then by their bits, which always comes to an end."""
    middle = low + np.float32(0.5) * (high - low)
    if round_ < _BY_VALUE and low > -HUGE and high < HUGE and low < middle and middle < high:
        return middle
    key = (_key(low) + _key(high)) >> 1
    return np.int32(key if key >= 0 else key ^ 0x7FFFFFFF).view(np.float32)


@inline
def cut_at(scores, n, k):
    """``(cut, count)``: at least ``k`` of ``scores[:n]`` reach the cut; ``count`` do, which is k but for ties and NaN.

    Bisection: counting a few hundred numbers is a handful of vector instructions, where quickselect guesses branches.
    """
    low, high = scores[0], scores[0]
    for q in range(n):
        low, high = min(low, scores[q]), max(high, scores[q])
    count = n
    for round_ in range(_BY_VALUE + 33):
        middle = _middle(low, high, round_)
        if count == k or not (low < middle < high):
            break
        reach = 0
        for q in range(n):
            reach += scores[q] >= middle
        if reach >= k:
            low, count = middle, reach
        else:
            high = middle
    if count > k:  # the largest value is a tie, or all that is left between low and high is
        reach = 0
        for q in range(n):
            reach += scores[q] >= high
        if reach >= k:
            low, count = high, reach
    return low, count


@inline
def reaching(maxima, bound, hot):
    """The groups whose maximum is at least ``bound``, into ``hot``; how many."""
    n = 0
    for g in range(len(maxima)):
        hot[n] = g
        n += maxima[g] >= bound
    return n


@inline
def collect(p, shift, signed, maxima, bound, hot, found):
    """Entries whose score is at least ``bound``, group by group; how many."""
    m, n_groups = len(p), len(maxima)
    n = 0
    for h in range(reaching(maxima, bound, hot)):
        for j in range(hot[h], m, n_groups):
            score = widen(p[j]) + shift[j]
            if signed:
                score = abs(score)
            found[n] = j
            n += score >= bound
    return n


@inline
def bound_of(maxima, k, scratch):
    """A lower bound of the k-th largest score, from group maxima (merged by fours when there are many)."""
    n_groups = len(maxima)
    quarter = n_groups // 4
    if quarter >= 4 * k and quarter >= MIN_GROUPS:
        for g in range(quarter):
            scratch[g] = max(max(maxima[g], maxima[g + quarter]), max(maxima[g + 2 * quarter], maxima[g + 3 * quarter]))
        return cut_at(scratch, quarter, k)[0]
    return cut_at(maxima, n_groups, k)[0]


@inline
def keep_best(found, scores, values, n, k, kept, kept_values):
    """The ``k`` entries with the largest scores; among equals the first found. Room left over is NaN."""
    w = 0
    if n > k:
        cut, count = cut_at(scores, n, k)
        spare = count - k  # ties beyond k: the smallest score kept is shared
        for q in range(n):
            if scores[q] >= cut and w < k:
                if spare > 0 and not scores[q] > cut:
                    continue
                kept[w] = found[q]
                kept_values[w] = values[q]
                w += 1
        for q in range(n):
            if spare > 0 and scores[q] == cut and w < k:
                kept[w] = found[q]
                kept_values[w] = values[q]
                w += 1
    else:
        for q in range(n):
            kept[w] = found[q]
            kept_values[w] = values[q]
            w += 1
    for q in range(w, k):  # only where scores are NaN
        kept[q] = 0
        kept_values[q] = np.float32(np.nan)
