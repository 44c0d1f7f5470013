"""Exact selection on a GPU, from float32 scores or through a bfloat16 screen, as :mod:`unweave.kernels.select.cpu`.

Top k of a row is two short kernels and no sort of the row. The first goes along the row twice: for the largest score
of each of some hundreds of groups, whose k-th largest bounds the k-th largest score from below; and to write down, in
order, the entries that reach the bound, typically k to 1.2 k of them. The second cuts these few to k, by counting.
Between the two, screened candidates are worked out again in float32. A third kernel passes over the rows that had more
candidates than room, or an error larger than the screen's margin, and does those again at leisure: which rows, the
host never learns, so nothing waits. Order, and which of equals is kept (the first), are always the same.

Where the number of entries varies, they are collected into fixed room per row, and moved together once the counts are
known; rows that need more are collected again, straight into place. Reading the counts is the one wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels._triton import (
    LOWEST_KEY,
    constexpr,
    count_above,
    jit,
    key_of,
    kth_largest,
    kth_largest_stored,
    launch,
    margin_of,
    power_of_two,
    score_of,
    teach,
    tile,
    tl,
    write_dots,
)  # fmt: skip
from unweave.kernels.gradients.gpu import gather_dot
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Exact

ROUNDING = tl.constexpr(2.0**-8)  # twice bfloat16's, of the score itself
_FINITE = tl.constexpr(-3.0e38)
_BLOCK = 1024  # scores a program looks at in one go
_GROUPS = 2048  # at least, where a row is long enough
_MOST_K = 512  # above, torch.topk
_ENTRIES = 8  # candidates worked out at once
_SCRATCH_BYTES = 1 << 26  # for rows done again
_ATTEMPTS = tl.constexpr(6)


# ---- top k of each row ---------------------------------------------------------------------------------------------


@jit
def _ranks(scores, shift, row, j, m, SIGNED: constexpr, SCREENED: constexpr):
    """``(rank, rounding)`` of entries ``j`` of a row: what they are sorted by, and how wrong bfloat16 makes that."""
    raw = tl.load(scores + row * m + j, mask=j < m, other=0.0).to(tl.float32)
    rank = raw + tl.load(shift + j, mask=j < m, other=0.0)
    if SIGNED:
        rank = tl.abs(rank)
    rounding = tl.zeros_like(rank)
    if SCREENED:
        rounding = ROUNDING * tl.abs(raw)
        # A screen passes over NaN, or a broken row would have all its entries worked out again.
        rank = tl.where(rank == rank, rank, float("-inf"))
        rounding = tl.where(rounding == rounding, rounding, 0.0)
    return rank, rounding


@jit
def _reach(
    scores, shift, row, low, m, indices, capacity,
    SIGNED: constexpr, SCREENED: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """Write the entries of a row whose upper rank has at least the key ``low``; how many, also if not all had room."""
    count = 0
    for at in range(0, m, BLOCK):
        j = at + tl.arange(0, BLOCK)
        rank, rounding = _ranks(scores, shift, row, j, m, SIGNED, SCREENED)
        hit = ((j < m) & (key_of(rank + rounding) >= low)).to(tl.int32)
        n = tl.sum(hit)
        if n > 0:
            slot = count + tl.cumsum(hit, 0) - 1
            tl.store(indices + slot, j, mask=(hit > 0) & (slot < capacity))
            count += n
    return count


@jit
def _lowest(bound, error):
    """The key that upper ranks must reach when ``bound`` is a bound of lower ranks without the row's error."""
    return key_of(tl.maximum(score_of(bound) - 2 * error, _FINITE))


@jit
def _find(
    scores, shift, lengths, margin, candidates, counts, bounds, m, k,
    SIGNED: constexpr, SCREENED: constexpr, CAPACITY: constexpr, GROUPS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One program per row: the bound from group maxima, then the entries that may be among the k largest."""
    row = tl.program_id(0).to(tl.int64)
    maxima = tl.full([GROUPS], LOWEST_KEY, tl.int32)
    for at in range(0, m, GROUPS):
        j = at + tl.arange(0, GROUPS)
        rank, rounding = _ranks(scores, shift, row, j, m, SIGNED, SCREENED)
        maxima = tl.maximum(maxima, tl.where(j < m, key_of(rank - rounding), LOWEST_KEY))
    bound = kth_largest(maxima, k, 18)  # rounded down: a bound all the same, in half the time
    low = bound
    if SCREENED:
        low = _lowest(bound, tl.load(margin) * tl.load(lengths + row))
    tl.store(bounds + row, bound)
    found = candidates + row * CAPACITY
    tl.store(counts + row, _reach(scores, shift, row, low, m, found, CAPACITY, SIGNED, SCREENED, BLOCK))


@jit
def _refine(X, W, candidates, counts, refined, d, CAPACITY: constexpr, BLOCK_E: constexpr, BLOCK_D: constexpr):
    """One program per row and block of candidates: their scores in float32, without shift."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK_E
    end = tl.minimum(tl.minimum(tl.load(counts + row), CAPACITY), start + BLOCK_E)
    at = row * CAPACITY
    write_dots(X + row * d, W, candidates + at, start, end, refined + at, d, BLOCK_E, BLOCK_D)


@jit
def _cut(
    scores, shift, lengths, margin, candidates, counts, refined, indices, values, worst, again, m, k,
    SIGNED: constexpr, SCREENED: constexpr, CAPACITY: constexpr,
):  # fmt: skip
    """One program per row: the k largest of its candidates, in order of their index; of equals, the first.

    ``again`` is set for rows whose candidates had no room, or an error larger than the margin. Places left over, which
    happens only where scores are not numbers, are NaN at feature 0.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CAPACITY)
    count = tl.load(counts + row)
    inside = c < count
    j = tl.load(candidates + row * CAPACITY + c, mask=inside, other=0)
    raw = tl.load(scores + row * m + j, mask=inside, other=0.0).to(tl.float32)
    failed = count > CAPACITY
    if SCREENED:
        truth = tl.load(refined + row * CAPACITY + c, mask=inside, other=0.0)
        norm = tl.load(lengths + row)
        beyond = tl.abs(truth - raw) - ROUNDING * tl.abs(raw)
        off = tl.max(tl.where(inside & (beyond > 0), beyond, 0.0))
        tl.store(worst + row, tl.where(norm > 0, off / norm, 0.0))
        failed = failed | (off > tl.load(margin) * norm)
        raw = truth
    tl.store(again + row, failed.to(tl.int32))
    value = raw + tl.load(shift + j, mask=inside, other=0.0)
    rank = value
    if SIGNED:
        rank = tl.abs(value)
    key = tl.where(inside, key_of(rank), LOWEST_KEY)
    cut = kth_largest(key, k, 32)
    more, tie = key > cut, inside & (key == cut)
    spare = k - tl.sum(more.to(tl.int32))
    keep = more | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= spare))
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(indices + row * k + slot, j, mask=keep)
    tl.store(values + row * k + slot, value, mask=keep)
    empty = (c >= tl.sum(keep.to(tl.int32))) & (c < k)
    tl.store(indices + row * k + c, tl.zeros_like(c), mask=empty)
    tl.store(values + row * k + c, tl.full([CAPACITY], float("nan"), tl.float32), mask=empty)


@jit
def _redo(
    scores, shift, X, W, lengths, margin, bounds, again, worst, found, ranks, indices, values, n_rows, m, d, k,
    SIGNED: constexpr, SCREENED: constexpr, BLOCK: constexpr, BLOCK_E: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """Rows marked in ``again``, with room for all their entries; programs take rows in turn. Slow, and rarely needed.

    While a candidate is further off than the margin, the margin is widened and the row screened again.
    """
    found += tl.program_id(0).to(tl.int64) * m
    ranks += tl.program_id(0).to(tl.int64) * m
    row = tl.program_id(0).to(tl.int64)
    while row < n_rows:
        if tl.load(again + row) > 0:
            norm, off, attempt, done = 0.0, 0.0, 0, 0
            if SCREENED:
                norm = tl.load(lengths + row)
                off = 0.5 * tl.maximum(tl.load(margin) * norm, 2 * tl.load(worst + row) * norm)
            count = 0
            while done == 0:
                error = 2 * off
                low = tl.load(bounds + row)
                if SCREENED:
                    low = _lowest(low, error)
                count = _reach(scores, shift, row, low, m, found, m, SIGNED, SCREENED, BLOCK)
                tl.debug_barrier()  # what this program's other threads stored is read next
                if SCREENED:
                    write_dots(X + row * d, W, found, 0, count, ranks, d, BLOCK_E, BLOCK_D)
                    tl.debug_barrier()
                off = 0.0
                for at in range(0, count, BLOCK):
                    c = at + tl.arange(0, BLOCK)
                    j = tl.load(found + c, mask=c < count, other=0)
                    value = tl.load(scores + row * m + j, mask=c < count, other=0.0).to(tl.float32)
                    if SCREENED:
                        truth = tl.load(ranks + c, mask=c < count, other=0.0)
                        beyond = tl.abs(truth - value) - ROUNDING * tl.abs(value)
                        off = tl.maximum(off, tl.max(tl.where((c < count) & (beyond > 0), beyond, 0.0)))
                        value = truth
                    value += tl.load(shift + j, mask=c < count, other=0.0)
                    tl.store(ranks + c, value, mask=c < count)
                attempt += 1
                done = ((off <= error) | (attempt >= _ATTEMPTS)).to(tl.int32)
                tl.debug_barrier()
            if SCREENED:
                tl.store(worst + row, tl.where(norm > 0, off / norm, 0.0))
            cut = kth_largest_stored(ranks, count, k, SIGNED, BLOCK)
            spare = k - count_above(ranks, count, cut, SIGNED, BLOCK)
            n_ties, n_kept = 0, 0
            for at in range(0, count, BLOCK):
                c = at + tl.arange(0, BLOCK)
                value = tl.load(ranks + c, mask=c < count, other=0.0)
                rank = value
                if SIGNED:
                    rank = tl.abs(value)
                key = tl.where(c < count, key_of(rank), LOWEST_KEY)
                tie = (c < count) & (key == cut)
                keep = (key > cut) | (tie & (n_ties + tl.cumsum(tie.to(tl.int32), 0) <= spare))
                slot = n_kept + tl.cumsum(keep.to(tl.int32), 0) - 1
                j = tl.load(found + c, mask=keep, other=0)
                tl.store(indices + row * k + slot, j, mask=keep)
                tl.store(values + row * k + slot, value, mask=keep)
                n_ties += tl.sum(tie.to(tl.int32))
                n_kept += tl.sum(keep.to(tl.int32))
            for at in range(n_kept, k, BLOCK):
                c = at + tl.arange(0, BLOCK)
                tl.store(indices + row * k + c, tl.zeros_like(c), mask=c < k)
                tl.store(values + row * k + c, tl.full([BLOCK], float("nan"), tl.float32), mask=c < k)
            tl.debug_barrier()  # the next row writes where this one is still being read
        row += tl.num_programs(0)


def topk(
    scores: Tensor, shift: Tensor, k: int, *, signed: bool = False, exact: Exact | None = None
) -> tuple[Pattern, Tensor]:
    """The ``k`` largest of ``scores + shift`` in each row; see :func:`unweave.kernels.select.cpu.topk`.

    A row's entries are in order of their index, and nothing here waits for the device if the screen is a
    :class:`unweave.kernels._triton.DeviceScreen`. NaN counts as the largest number, as with ``torch.topk``; a screen
    passes over it.
    """
    scores, device = scores.contiguous(), scores.device
    n, m = scores.shape
    k = min(k, m)
    offsets = torch.arange(n + 1, device=device) * k
    if n == 0 or k == 0 or k > _MOST_K:
        best = _by_torch(scores, shift, k, signed, exact)
        return Pattern(offsets, best[0].reshape(-1).int(), m), best[1].reshape(-1)
    plan = topk_plan(m, k)
    flags, capacity = {"SIGNED": signed, "SCREENED": exact is not None}, plan["CAPACITY"]
    indices = torch.empty(n, k, dtype=torch.int32, device=device)
    candidates = torch.empty(n, capacity, dtype=torch.int32, device=device)
    counts, bounds, again = torch.empty(3, n, dtype=torch.int32, device=device)
    values, worst = torch.empty(n, k, device=device), torch.zeros(n, device=device)
    X = W = lengths = margin = refined = shift  # not read without a screen
    d, blocks = 1, tile(1, _ENTRIES)
    if exact is not None:
        X, W, lengths, margin = (
            exact.X.contiguous(),
            exact.W.contiguous(),
            exact.lengths,
            margin_of(exact.screen, device),
        )
        refined = torch.empty(n, capacity, device=device)
        d, blocks = X.shape[1], tile(X.shape[1], _ENTRIES)
    launch(_find, (n,), scores, shift, lengths, margin, candidates, counts, bounds, m, k, **flags, **plan)
    if exact is not None:
        launch(_refine, (n, capacity // _ENTRIES), X, W, candidates, counts, refined, d, capacity, **blocks)
    read = (scores, shift, lengths, margin, candidates, counts, refined)
    launch(_cut, (n,), *read, indices, values, worst, again, m, k, **flags, CAPACITY=capacity, num_warps=4)
    n_programs = max(1, min(n, 1024, _SCRATCH_BYTES // (8 * m)))
    found = torch.empty(n_programs, m, dtype=torch.int32, device=device)
    ranks = torch.empty(n_programs, m, device=device)
    read = (scores, shift, X, W, lengths, margin, bounds, again)
    into = (worst, found, ranks, indices, values, n, m, d, k)
    launch(_redo, (n_programs,), *read, *into, **flags, BLOCK=_BLOCK // 2, **blocks)
    if exact is not None:
        teach(exact.screen, worst.max(), again.sum(), n)
    return Pattern(offsets, indices.reshape(-1), m), values.reshape(-1)


def topk_plan(m: int, k: int) -> dict[str, int]:
    """Block sizes for rows of ``m`` scores: 4 k groups or more, and room for twice k candidates and a few."""
    groups = min(max(_GROUPS, power_of_two(4 * k)), max(power_of_two(m), 32))
    capacity = min(max(128, power_of_two(2 * k + 32)), max(power_of_two(m), 32))
    return {"CAPACITY": capacity, "GROUPS": groups, "BLOCK": _BLOCK, "num_warps": 4}


def _by_torch(scores: Tensor, shift: Tensor, k: int, signed: bool, exact: Exact | None) -> tuple[Tensor, Tensor]:
    score = (scores.float() if exact is None else exact.X @ exact.W.T) + shift
    indices = (score.abs() if signed else score).topk(k, sorted=False).indices
    return indices, score.gather(1, indices)


# ---- every score above a bound --------------------------------------------------------------------------------------


@jit
def _collect(
    scores, shift, threshold, slack, starts, ends, indices, found, counts, m,
    PER_FEATURE: constexpr, STRICT: constexpr, SCREENED: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One program per row: entries whose upper score reaches its threshold go to ``starts[row]`` and on.

    What does not fit before ``ends[row]`` is counted only. ``found`` gets the scores as they were, without shift.
    """
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + row), tl.load(ends + row)
    count = 0
    extra = 0.0
    if SCREENED:
        extra = tl.load(slack + row)
    for at in range(0, m, BLOCK):
        j = at + tl.arange(0, BLOCK)
        raw = tl.load(scores + row * m + j, mask=j < m, other=0.0).to(tl.float32)
        upper = raw + tl.load(shift + j, mask=j < m, other=0.0)
        if SCREENED:
            upper += ROUNDING * tl.abs(raw) + extra
        if PER_FEATURE:
            bound = tl.load(threshold + j, mask=j < m, other=0.0)
        else:
            bound = tl.load(threshold)
        if STRICT:
            hit = upper > bound
        else:
            hit = upper >= bound
        hit = ((j < m) & hit).to(tl.int32)
        n = tl.sum(hit)
        if n > 0:
            slot = start + count + tl.cumsum(hit, 0) - 1
            tl.store(indices + slot, j, mask=(hit > 0) & (slot < end))
            tl.store(found + slot, raw, mask=(hit > 0) & (slot < end))
            count += n
    tl.store(counts + row, count)


@jit
def _pack(starts, offsets, indices, found, packed_indices, packed, BLOCK: constexpr):
    """One program per row: move its entries to their place in CSR order."""
    row = tl.program_id(0).to(tl.int64)
    source, target = tl.load(starts + row), tl.load(offsets + row)
    count = tl.load(offsets + row + 1) - target
    for at in range(0, count, BLOCK):
        c = at + tl.arange(0, BLOCK)
        tl.store(packed_indices + target + c, tl.load(indices + source + c, mask=c < count), mask=c < count)
        tl.store(packed + target + c, tl.load(found + source + c, mask=c < count), mask=c < count)


def _candidates(
    scores: Tensor, shift: Tensor, threshold: Tensor, slack: Tensor | None, strict: bool, expected: float
) -> tuple[Pattern, Tensor]:
    """Entries whose score (with its error) reaches the threshold, a ``(1,)`` or ``(n_features,)`` tensor."""
    n, m = scores.shape
    device, capacity = scores.device, min(m, int(expected) + 16)
    starts = torch.arange(n, device=device) * capacity
    indices = torch.empty(n * capacity, dtype=torch.int32, device=device)
    found, counts = torch.empty(n * capacity, device=device), torch.empty(n, dtype=torch.long, device=device)
    offsets = torch.zeros(n + 1, dtype=torch.long, device=device)
    if n == 0:
        return Pattern(offsets, indices, m), found
    flags = {"PER_FEATURE": len(threshold) == m, "STRICT": strict, "SCREENED": slack is not None}
    read = (scores, shift, threshold, shift if slack is None else slack)
    sizes = {"BLOCK": _BLOCK, "num_warps": 4}
    launch(_collect, (n,), *read, starts, starts + capacity, indices, found, counts, m, **flags, **sizes)
    torch.cumsum(counts, 0, out=offsets[1:])
    total, most = torch.stack([offsets[-1], counts.max()]).tolist()  # the one wait: how much there is
    packed = torch.empty(total, dtype=torch.int32, device=device), torch.empty(total, device=device)
    if most > capacity:
        launch(_collect, (n,), *read, offsets[:-1], offsets[1:], *packed, counts, m, **flags, **sizes)
    else:
        launch(_pack, (n,), starts, offsets, indices, found, *packed, BLOCK=128, num_warps=4)
    return Pattern(offsets, packed[0], m), packed[1]


def above(
    scores: Tensor, shift: Tensor, threshold: Tensor | float, *, exact: Exact | None = None, expected: float = 64.0
) -> tuple[Pattern, Tensor]:
    """Every entry of ``scores + shift`` above its threshold; see :func:`unweave.kernels.select.cpu.above`."""
    scores, device = scores.contiguous(), scores.device
    threshold = torch.as_tensor(threshold, dtype=torch.float32, device=device).expand(len(shift)).contiguous()
    expected = 2 * expected  # room is cheap, collecting again is not
    if exact is None:
        pattern, raw = _candidates(scores, shift, threshold, None, True, expected)
        return pattern, raw + shift[pattern.indices.long()]
    for attempt in range(_ATTEMPTS.value):
        slack = margin_of(exact.screen, device) * exact.lengths
        pattern, screened = _candidates(scores, shift, threshold, slack, False, expected)
        raw, fits = _refined(pattern, screened, slack, exact)
        if fits or attempt == _ATTEMPTS.value - 1:
            feature = pattern.indices.long()
            values = raw + shift[feature]
            return _keep_entries(pattern, values, values > threshold[feature])
    raise AssertionError("unreachable")


def batch_topk(
    scores: Tensor, shift: Tensor, n_keep: int, *, bound: float | None = None, exact: Exact | None = None
) -> tuple[Pattern, Tensor]:
    """The ``n_keep`` largest positive entries of ``scores + shift``; see :func:`unweave.kernels.select.cpu.batch_topk`.

    Entries that may reach the guessed bound are collected. If the n_keep-th largest of their lower scores reaches it
    too, no other entry can be among the n_keep largest; if not, that is the next guess.
    """
    scores, device = scores.contiguous(), scores.device
    n, m = scores.shape
    n_keep = min(n_keep, scores.numel())
    if n_keep == 0:
        empty = torch.zeros(0, device=device)
        return Pattern(torch.zeros(n + 1, dtype=torch.long, device=device), empty.int(), m), empty
    guess, attempt = bound if bound is not None and bound > 0 else _sampled_bound(scores, shift, n_keep), 0
    while True:
        slack = None if exact is None else margin_of(exact.screen, device) * exact.lengths
        pattern, raw = _candidates(
            scores, shift, torch.full((1,), guess, device=device), slack, False, 3.0 * n_keep / n
        )
        score = raw + shift[pattern.indices.long()]
        if slack is None:
            if len(score) >= n_keep or guess <= 0:
                return _best(pattern, score, n_keep)
            lower = 0.0
        else:
            error = slack[pattern.rows] + ROUNDING.value * raw.abs()
            lower = max(0.0, float(_kth_largest(score - error, n_keep))) if len(score) >= n_keep else 0.0
            if lower >= guess:
                near = score + error >= lower
                pattern, raw = _keep_entries(pattern, raw, near)
                values, fits = _refined(pattern, raw, slack, exact)
                attempt += 1
                if fits or attempt >= _ATTEMPTS.value:
                    return _best(pattern, values + shift[pattern.indices.long()], n_keep)
                continue
        if lower == 0:
            lower = min(0.9 * guess, _sampled_bound(scores, shift, n_keep)) if guess > 1e-6 else 0.0
        guess = lower


def _refined(pattern: Pattern, screened: Tensor, slack: Tensor, exact: Any) -> tuple[Tensor, bool]:
    """Candidates in float32 (without shift), and whether no error was larger than the margin they were found with.

    A candidate that is not a number is no error of the screen.
    """
    values = gather_dot(pattern, exact.X, exact.W)
    if len(values) == 0:
        return values, True
    rows = pattern.rows
    off = (values - screened).abs() - ROUNDING.value * screened.abs()
    wrong = torch.zeros(pattern.n_rows, dtype=torch.bool, device=values.device)
    wrong[rows[off > slack[rows]]] = True
    worst = torch.nan_to_num(off / exact.lengths[rows].clamp_min(1e-30), nan=0.0, posinf=0.0).max()
    n_wrong = wrong.sum()
    teach(exact.screen, worst, n_wrong, pattern.n_rows)
    return values, not bool(n_wrong)


def _keep_entries(pattern: Pattern, values: Tensor, keep: Tensor) -> tuple[Pattern, Tensor]:
    n_before = torch.zeros(len(keep) + 1, dtype=torch.long, device=keep.device)
    torch.cumsum(keep, 0, out=n_before[1:])
    kept = keep.nonzero().squeeze(1)
    return Pattern(n_before[pattern.offsets], pattern.indices[kept], pattern.n_features), values[kept]


def _best(pattern: Pattern, values: Tensor, n_keep: int) -> tuple[Pattern, Tensor]:
    """The ``n_keep`` largest positive entries; among equals the first."""
    keep = values > 0
    if len(values) > n_keep:
        kth = _kth_largest(values, n_keep)
        tie = values == kth
        keep &= (values > kth) | (tie & (tie.cumsum(0) <= n_keep - (values > kth).sum()))
    return _keep_entries(pattern, values, keep)


def _kth_largest(values: Tensor, k: int) -> Tensor:
    return values.kthvalue(len(values) - k + 1).values


def _sampled_bound(scores: Tensor, shift: Tensor, n_keep: int) -> float:
    """A score that somewhat more than ``n_keep`` of all are likely to reach, from some 32 rows."""
    sample = (scores[:: max(1, len(scores) // 32)].float() + shift).reshape(-1)
    n_sample = min(int(1.3 * n_keep * len(sample) / scores.numel()) + 4, len(sample))
    return max(0.0, float(sample.topk(n_sample, sorted=False).values.min()))
