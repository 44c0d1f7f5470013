"""Exact selection on a CPU, from float32 scores or through a screen of rough ones, which come in bfloat16.

One pass takes the largest score of each of some hundreds of groups of a row; the k-th largest of these maxima bounds
the k-th largest score from below, so only groups that reach the bound are looked into. A screened row is selected
with a margin as wide as they can be wrong, what was found is worked out again in float32, and the best of that is
kept: the result is the one float32 scores would have given.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from unweave.kernels._jit import array, dots, jit, run, widen
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Exact
from unweave.kernels.select._loops import HUGE, MIN_GROUPS, bound_of, collect, cut_at, group_maxima, keep_best, reaching

_GROUPS_OF_8 = 768  # at most; beyond, groups of 16: more groups are more bookkeeping, larger ones more to look through
_ROUNDING = np.float32(2.0**-8)  # bfloat16's, of the score as it was rounded
_OWN = np.float32(2.0**-8 / (1 - 2.0**-8) * 1.001)  # the same of the score before, and of what else is wrong with it
_TWICE = np.float32(2.02)  # two margins, and what the rounding of a score of another size differs by
_TRIES = 4  # widenings of a margin; each is at least as wide as the largest error met
_NEARLY_ALL = 0.8  # of the entries collected
_UP = np.float32(1 + 2.0**-20)  # a norm is rounded by less


# ---- top k of each row ---------------------------------------------------------------------------------------------


@jit
def _topk(lo, hi, P, start, shift, k, signed, n_groups, indices, values):
    m = len(shift)
    maxima, scratch, exact = np.empty(n_groups, np.float32), np.empty(m + 1, np.float32), np.empty(m + 1, np.float32)
    hot, found = np.empty(n_groups + 1, np.int32), np.empty(m + 1, np.int32)
    for b in range(lo, hi):
        p = P[b, start : start + m]
        group_maxima(p, shift, signed, np.float32(0), maxima)
        n = collect(p, shift, signed, maxima, bound_of(maxima, k, scratch), hot, found)
        for q in range(n):
            exact[q] = widen(p[found[q]]) + shift[found[q]]
            scratch[q] = abs(exact[q]) if signed else exact[q]
        keep_best(found, scratch, exact, n, k, indices[b], values[b])


@jit
def _screen_topk(
    lo, hi, P, start, shift, k, signed, n_groups, X, W, tolerance, lengths, largest_shift,
    indices, values, worst, redone,
):  # fmt: skip
    m = len(shift)
    maxima, scratch, exact = np.empty(n_groups, np.float32), np.empty(m + 1, np.float32), np.empty(m + 1, np.float32)
    hot, found, near = np.empty(n_groups + 1, np.int32), np.empty(m + 1, np.int32), np.empty(m + 1, np.int32)
    for b in range(lo, hi):
        p, x = P[b, start : start + m], X[b]
        group_maxima(p, shift, signed, np.float32(0), maxima)
        bound = bound_of(maxima, k, scratch)
        error = tolerance * lengths[b]
        off = np.float32(0)
        for _ in range(_TRIES):
            low = bound - _TWICE * (error + _ROUNDING * (abs(bound) + largest_shift))
            n = collect(p, shift, signed, maxima, low, hot, found)
            for q in range(n):
                score = widen(p[found[q]]) + shift[found[q]]
                scratch[q] = abs(score) if signed else score
            cut = cut_at(scratch, n, k)[0] if n > k else low
            # The best by the screen come first: the smallest of their true scores bounds the k-th largest from below,
            # and of the others only those are worked out that may reach it.
            n_near = 0
            for q in range(n):
                near[n_near] = found[q]
                n_near += scratch[q] >= cut
            n_first, least = n_near, HUGE
            dots(x, W, near, 0, n_first, exact)
            for q in range(n_first):
                score = exact[q] + shift[near[q]]
                least = min(least, abs(score) if signed else score)
            low = least - (1 + _OWN) * error - _OWN * (abs(least) + largest_shift)
            for q in range(n):
                near[n_near] = found[q]
                n_near += scratch[q] < cut and scratch[q] >= low
            dots(x, W, near, n_first, n_near, exact)
            off = np.float32(0)
            for q in range(n_near):
                screened = widen(p[near[q]])
                off = max(off, abs(exact[q] - screened) - _ROUNDING * abs(screened))
                exact[q] += shift[near[q]]
                scratch[q] = abs(exact[q]) if signed else exact[q]
            if off <= error:
                break
            redone[b] = 1
            error = 2 * off
        worst[b] = off / lengths[b] if lengths[b] > 0 else np.float32(0)
        keep_best(near, scratch, exact, n_near, k, indices[b], values[b])


# ---- every score above a bound ------------------------------------------------------------------------------------


@jit
def _above(lo, hi, P, start, shift, low, rounding, n_groups, capacity, indices, raws, starts, counts):
    """Entries of row ``b`` with ``P + shift + rounding |P| >= low[b]``; a chunk writes from ``lo * capacity`` on.

    A chunk whose entries do not fit its share of the room sets the counts of its rows to -1.
    """
    m = len(shift)
    maxima, hot = np.empty(n_groups, np.float32), np.empty(n_groups + 1, np.int32)
    at, end = lo * capacity, hi * capacity
    for b in range(lo, hi):
        p, bound = P[b, start : start + m], low[b]
        group_maxima(p, shift, False, rounding, maxima)
        n, room = 0, end - at
        for h in range(reaching(maxima, bound, hot)):
            for j in range(hot[h], m, n_groups):
                raw = widen(p[j])
                slot = at + min(n, room - 1)
                indices[slot] = j
                raws[slot] = raw
                n += raw + shift[j] + rounding * abs(raw) >= bound
        if n > room - 1:  # the last place is scratch: it takes whatever does not fit
            for c in range(lo, hi):
                counts[c] = -1
            return
        starts[b], counts[b] = at, n
        at += n


@jit
def _pack(lo, hi, starts, offsets, indices, scores, packed_indices, packed_scores):
    for b in range(lo, hi):
        n, source, target = offsets[b + 1] - offsets[b], starts[b], offsets[b]
        packed_indices[target : target + n] = indices[source : source + n]
        packed_scores[target : target + n] = scores[source : source + n]


@jit
def _refine(lo, hi, offsets, indices, X, W, out):
    """``out[e] = X[row of e] . W[feature of e]``."""
    for b in range(lo, hi):
        x = X[b]
        dots(x, W, indices, offsets[b], offsets[b + 1], out)


@jit
def _rounding_errors(lo, hi, A, low, norms, off):
    for b in range(lo, hi):
        row, rounded, total, lost = A[b], low[b], 0.0, 0.0  # float64: squares of small numbers are smaller still
        for j in range(len(row)):
            value, left = np.float64(row[j]), np.float64(row[j] - widen(rounded[j]))
            total += value * value
            lost += left * left
        norms[b], off[b] = np.float32(np.sqrt(total)) * _UP, np.float32(np.sqrt(lost)) * _UP


# ---- what callers use ----------------------------------------------------------------------------------------------


def rounding_errors(A: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """At least the norms of the rows of A, and of what they lost in the bfloat16 copy ``low``; both ``(n,)``."""
    norms, off = torch.empty(len(A)), torch.empty(len(A))
    run(_rounding_errors, len(A), *map(array, (A, low, norms, off)), work=2 * A.shape[1])
    return norms, off


def topk(
    scores: Tensor, shift: Tensor, k: int, *, signed: bool = False, exact: Exact | None = None
) -> tuple[Pattern, Tensor]:
    """The ``k`` largest of ``scores + shift`` in each row.

    Args:
        scores: ``(n, n_features)`` float32; or bfloat16, to be taken as they are or, with ``exact``, as a screen.
        shift: ``(n_features,)``, added to every row (the encoder's bias).
        signed: rank by absolute value.

    Returns:
        The pattern and the ``(n k,)`` values at its entries, in float32.
    """
    n, m = scores.shape
    k = min(k, m)
    indices, values = torch.empty(n, k, dtype=torch.int32), torch.empty(n, k)
    n_groups = _n_groups(m, k)
    if n == 0:
        pass
    elif exact is None:
        run(_topk, n, *_columns(scores), array(shift), k, signed, n_groups, array(indices), array(values), work=m)
    else:
        worst, redone = np.zeros(n, np.float32), np.zeros(n, np.int32)
        margin = np.float32(exact.screen.tolerance), array(exact.lengths), _largest(shift)
        scored = *_columns(scores), array(shift), k, signed, n_groups
        into = array(indices), array(values), worst, redone
        run(_screen_topk, n, *scored, array(exact.X), array(exact.W), *margin, *into, work=m)
        exact.screen.update(float(worst.max()), int(redone.sum()), n)
    return Pattern(torch.arange(n + 1) * k, indices.reshape(-1), m), values.reshape(-1)


def above(
    scores: Tensor,
    shift: Tensor,
    threshold: Tensor | float,
    *,
    exact: Exact | None = None,
    expected: float = 64.0,
) -> tuple[Pattern, Tensor]:
    """Every entry of ``scores + shift`` above its threshold (a number, or one per feature).

    Args:
        expected: entries per row to make room for at first; more are found all the same.
    """
    threshold = torch.as_tensor(threshold, dtype=torch.float32).expand(len(shift))
    for attempt in range(_TRIES):
        slack = None if exact is None else exact.screen.tolerance * exact.lengths
        pattern, raw = _entries(scores, shift - threshold, 0.0, slack, expected)
        fits = True
        if exact is not None:
            raw, fits = _refined(pattern, raw, exact)
        if fits or attempt == _TRIES - 1:
            # Score by score as the reference computes it: u - threshold > 0 and u > threshold round differently.
            feature = pattern.indices.long()
            raw = raw + shift[feature]
            return _keep_entries(pattern, raw, raw > threshold[feature])
    raise AssertionError("unreachable")


def batch_topk(
    scores: Tensor, shift: Tensor, n_keep: int, *, bound: float | None = None, exact: Exact | None = None
) -> tuple[Pattern, Tensor]:
    """The ``n_keep`` largest positive entries of ``scores + shift`` in the whole batch.

    Args:
        bound: a guess of the smallest score that will be kept, a little low; the last batch's, say. A bad guess costs
            time, never exactness.
    """
    n, m = scores.shape
    n_keep = min(n_keep, scores.numel())
    if n_keep == 0:
        return _empty(n, m), torch.zeros(0)
    guess = bound if bound is not None and bound > 0 else _sampled_bound(scores, shift, n_keep)
    attempt = 0
    while True:
        margin = None if exact is None else exact.screen.tolerance * exact.lengths
        pattern, raw = _entries(scores, shift, guess, margin, 2.0 * n_keep / max(1, n))
        offset = shift[pattern.indices.long()]
        found = raw + offset
        # Entries in reach only through their row's margin do not count: they may be far below the guess.
        if int((found >= guess).sum()) < n_keep and guess > 0:
            guess = min(0.9 * guess, _sampled_bound(scores, shift, n_keep)) if guess > 1e-6 else 0.0
            continue
        kth = _kth_largest(found, n_keep) if len(found) >= n_keep else 0.0
        if exact is None or margin is None or not math.isfinite(kth):
            return _best(pattern, found, n_keep)
        # As in _screen_topk: the best by the screen bound the n_keep-th largest, then whatever may reach that. Of so
        # many some are wrong by a whole margin; with those that such errors have left out the bound is a close one.
        first = found >= kth - float(margin.mean())
        if int(first.sum()) >= _NEARLY_ALL * len(first):
            first[:] = True  # the few others at once: taking entries apart costs more
        values, fit_first = _refined(pattern, raw, exact, first)
        values = values + offset
        least = max(0.0, _kth_largest(values[first], n_keep)) if int(first.sum()) >= n_keep else 0.0
        if least < guess:  # what may reach it was not collected
            guess = least
            continue
        reach = found + (1 + _OWN) * margin[pattern.rows] >= least - _OWN * (least + _largest(shift))
        others, fit_others = _refined(pattern, raw, exact, reach & ~first)
        attempt += 1
        if (fit_first and fit_others) or attempt == _TRIES:
            values = torch.where(first, values, others + offset)
            return _best(*_keep_entries(pattern, values, first | reach), n_keep)


def _columns(scores: Tensor) -> tuple[np.ndarray, int]:
    """The matrix these scores are columns of, and the first of them: kernels run fastest over whole rows."""
    n, m = scores.shape
    if scores.is_contiguous() or n < 2:
        return array(scores.contiguous()), 0
    start = int(scores.storage_offset()) % scores.stride(0)
    if scores.stride(1) != 1 or start + m > scores.stride(0):
        return array(scores.contiguous()), 0
    whole = scores.as_strided((n, scores.stride(0)), (scores.stride(0), 1), scores.storage_offset() - start)
    return array(whole), start


def _largest(shift: Tensor) -> np.float32:
    """bfloat16 rounds the score before the shift, which may be larger than their sum by this much."""
    return np.float32(np.abs(array(shift)).max(initial=0))


def _entries(
    scores: Tensor, shift: Tensor, low: float, slack: Tensor | None, expected: float
) -> tuple[Pattern, Tensor]:
    """Entries with ``scores + shift >= low``, less each row's slack and the rounding where scores are screened.

    Returns:
        Their pattern and their scores without the shift, ``(nnz,)`` float32.
    """
    n, m = scores.shape
    bound = torch.full((n,), low) if slack is None else low - slack
    rounding = np.float32(0) if slack is None else _ROUNDING
    starts, counts = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    capacity = min(m + 1, int(expected) + 16)  # + 1: a chunk of rows has a place for what does not fit
    while True:
        indices, found = torch.empty(n * capacity, dtype=torch.int32), torch.empty(n * capacity)
        into = (array(indices), array(found), array(starts), array(counts))
        run(
            _above, n, *_columns(scores), array(shift), array(bound), rounding, _n_groups(m, 1), capacity, *into, work=m
        )
        if n == 0 or int(counts.min()) >= 0:
            break
        capacity = min(m + 1, 4 * capacity)
    offsets = torch.zeros(n + 1, dtype=torch.long)
    offsets[1:] = counts.cumsum(0)
    packed, packed_scores = torch.empty(int(offsets[-1]), dtype=torch.int32), torch.empty(int(offsets[-1]))
    run(
        _pack,
        n,
        *map(array, (starts, offsets, indices, found, packed, packed_scores)),
        work=4 * len(packed) / max(1, n),
    )
    return Pattern(offsets, packed, m), packed_scores


def _refined(pattern: Pattern, screened: Tensor, exact: Exact, which: Tensor | None = None) -> tuple[Tensor, bool]:
    """Candidates in float32 (without shift), and whether no error was larger than the margin they were found with.

    With ``which``, a mask of the entries, only those are worked out; the others are zero.
    """
    if which is not None and not bool(which.any()):
        return torch.zeros(len(screened)), True
    if which is not None:
        part, part_screened = _keep_entries(pattern, screened, which)
        values, fits = _refined(part, part_screened, exact)
        return torch.zeros(len(screened)).masked_scatter_(which, values), fits
    values = torch.empty(len(pattern.indices))
    work = len(values) / max(1, pattern.n_rows) * exact.X.shape[1]
    run(_refine, pattern.n_rows, *map(array, (pattern.offsets, pattern.indices, exact.X, exact.W, values)), work=work)
    if len(values) == 0:
        return values, True
    lengths = exact.lengths[pattern.rows].clamp_min(1e-30)
    off = ((values - screened).abs() - float(_ROUNDING) * screened.abs()) / lengths
    worst, tolerance = float(off.nan_to_num(nan=0.0).max()), exact.screen.tolerance
    wrong = off > tolerance
    n_redone = len(pattern.rows[wrong].unique()) if worst > tolerance else 0
    exact.screen.update(worst, n_redone, pattern.n_rows)
    return values, not worst > tolerance


def _keep_entries(pattern: Pattern, values: Tensor, keep: Tensor) -> tuple[Pattern, Tensor]:
    if bool(keep.all()):
        return pattern, values
    n_before = torch.zeros(len(keep) + 1, dtype=torch.long)
    torch.cumsum(keep, 0, out=n_before[1:])
    offsets = n_before[pattern.offsets]
    return Pattern(offsets, pattern.indices[keep], pattern.n_features), values[keep]


def _best(pattern: Pattern, values: Tensor, n_keep: int) -> tuple[Pattern, Tensor]:
    """The ``n_keep`` largest positive entries; among equals the first."""
    if len(values) > n_keep:
        kth = _kth_largest(values, n_keep)
        keep = values > max(kth, 0.0)
        if kth > 0:
            ties = (values == kth).nonzero().squeeze(1)
            keep[ties[: n_keep - int(keep.sum())]] = True
    else:
        keep = values > 0
    return _keep_entries(pattern, values, keep)


def _kth_largest(values: Tensor, k: int) -> float:
    return float(np.partition(values.numpy(), len(values) - k)[len(values) - k])


def _sampled_bound(scores: Tensor, shift: Tensor, n_keep: int) -> float:
    """A score that somewhat more than ``n_keep`` of all are likely to reach, from some 32 rows."""
    sample = (scores[:: max(1, len(scores) // 32)].float() + shift).reshape(-1)
    n_sample = min(int(1.3 * n_keep * len(sample) / scores.numel()) + 4, len(sample))
    return max(0.0, float(sample.topk(n_sample, sorted=False).values.min()))


def _empty(n: int, m: int) -> Pattern:
    return Pattern(torch.zeros(n + 1, dtype=torch.long), torch.zeros(0, dtype=torch.int32), m)


def _n_groups(m: int, k: int) -> int:
    return min(m, max(MIN_GROUPS, min(m // 8, _GROUPS_OF_8), m // 16, 2 * k))
