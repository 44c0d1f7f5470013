"""Row gradients on a GPU: each feature sums over its own entries, without atomics, so every run gives the same bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unweave.kernels._triton import check_contiguous, constexpr, jit, launch, tile, tl, weighted_sum, write_dots
from unweave.kernels.csc.reference import Columns
from unweave.kernels.gradients.reference import Extra
from unweave.kernels.pattern import Pattern

SEGMENT = 512  # entries of one feature that one program sums at most
_ENTRIES = 8  # rows read at once
_FEATURES, _TOGETHER = 32, 32  # a tile of sum_over: features by entries


class Heavy(NamedTuple):
    """Sums over segments of the features with more than SEGMENT entries.

    Feature ``f`` has the segments ``first[f]`` to ``first[f + 1]`` (none if it is light), whose sums are rows of
    ``sums``. ``exists`` is False where no feature can be heavy.
    """

    first: Tensor  # (n_features + 1,) int64
    sums: Tensor  # (n_segments, d) float32
    exists: bool


@jit
def _gather_dot(offsets, indices, A, W, out, d, BLOCK_E: constexpr, BLOCK_D: constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    write_dots(A + row * d, W, indices, start, end, out, d, BLOCK_E, BLOCK_D)


@jit
def _sum_segments(
    starts, order, rows, weights, A, first, owner, sums, n_features, d, SEGMENT: constexpr,
    BLOCK_E: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """One program per segment and block of columns; there may be fewer segments than programs."""
    segment, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D
    feature = tl.load(owner + segment)
    if feature < n_features:
        start = tl.load(starts + feature) + (segment - tl.load(first + feature)) * SEGMENT
        end = tl.minimum(start + SEGMENT, tl.load(starts + feature + 1))
        total = weighted_sum(A, rows, order, weights, start, end, column, d, True, BLOCK_E, BLOCK_D)
        columns = column + tl.arange(0, BLOCK_D)
        tl.store(sums + segment * d + columns, total, mask=columns < d)


@jit
def row_gradient(
    starts, order, rows, weights, A, first, sums, at, more, pull, W, feature, column, d,
    HAS_HEAVY: constexpr, HAS_MORE: constexpr, HAS_PULL: constexpr,
    BLOCK_E: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """``sum of weight * A[row]`` over the entries of a feature plus what is extra, in columns from ``column`` on."""
    columns = column + tl.arange(0, BLOCK_D)
    inside = columns < d
    start, end = tl.load(starts + feature), tl.load(starts + feature + 1)
    if HAS_HEAVY:
        segment, stop = tl.load(first + feature), tl.load(first + feature + 1)
        # A heavy feature's entries are in its segments' sums already: its own range is empty.
        end = tl.where(segment < stop, start, end)
        total = weighted_sum(A, rows, order, weights, start, end, column, d, True, BLOCK_E, BLOCK_D)
        for s in range(segment, stop):
            total += tl.load(sums + s * d + columns, mask=inside, other=0.0)
    else:
        total = weighted_sum(A, rows, order, weights, start, end, column, d, True, BLOCK_E, BLOCK_D)
    if HAS_MORE:
        row = tl.load(at + feature)
        width = tl.where(row >= 0, d, 0)
        total += tl.load(more + row * d + columns, mask=columns < width, other=0.0)
    if HAS_PULL:
        total += tl.load(pull + feature) * tl.load(W + feature * d + columns, mask=inside, other=0.0)
    return total


@jit
def _sum_outer(
    starts, order, rows, weights, A, first, sums, at, more, pull, W, out, d,
    HAS_HEAVY: constexpr, HAS_MORE: constexpr, HAS_PULL: constexpr,
    BLOCK_E: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """One program per feature and block of columns."""
    feature, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D
    total = row_gradient(
        starts, order, rows, weights, A, first, sums, at, more, pull, W, feature, column, d,
        HAS_HEAVY, HAS_MORE, HAS_PULL, BLOCK_E, BLOCK_D,
    )  # fmt: skip
    columns = column + tl.arange(0, BLOCK_D)
    tl.store(out + feature * d + columns, total, mask=columns < d)


@jit
def _sum_over(
    starts, order, rows, weights, lengths, out, n_features,
    HAS_LENGTHS: constexpr, FEATURES: constexpr, TOGETHER: constexpr,
):  # fmt: skip
    """One program per block of features, as many rounds as its largest feature needs.

    With lengths it is the sum of ``|weight| * length[row]``.
    """
    feature = tl.program_id(0).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    inside = feature < n_features
    start = tl.load(starts + feature, mask=inside, other=0)
    end = tl.load(starts + feature + 1, mask=inside, other=0)
    total = tl.zeros([FEATURES, TOGETHER], tl.float32)
    for at in range(0, tl.max(end - start), TOGETHER):
        entry = start[:, None] + at + tl.arange(0, TOGETHER)[None, :]
        here = entry < end[:, None]
        position = tl.load(order + entry, mask=here, other=0)
        weight = tl.load(weights + position, mask=here, other=0.0).to(tl.float32)
        if HAS_LENGTHS:
            row = tl.load(rows + entry, mask=here, other=0)
            weight = tl.abs(weight) * tl.load(lengths + row, mask=here, other=0.0)
        total += weight
    tl.store(out + feature, tl.sum(total, 1), mask=inside)


def gather_dot(pattern: Pattern, A: Tensor, W: Tensor) -> Tensor:
    """``out[e] = A[row of e] . W[feature of e]``, shape ``(nnz,)``, in float32."""
    out = torch.empty(len(pattern.indices), device=A.device)
    read = (pattern.offsets, pattern.indices, A.contiguous(), W.contiguous())
    launch(_gather_dot, (pattern.n_rows,), *read, out, A.shape[1], **tile(A.shape[1], _ENTRIES))
    return out


def heavy(columns: Columns, weights: Tensor, A: Tensor) -> Heavy:
    """Sum the segments of features with more than SEGMENT entries, so that no program has much more to do than others.

    How many segments there are stays on the device; from the number of entries it follows how many there can be.
    """
    n_features, d = len(columns.starts) - 1, A.shape[1]
    nnz, blocks = len(columns.order), tile(d, _ENTRIES)
    if nnz <= SEGMENT:
        return Heavy(columns.starts, A, False)  # neither is read
    most = 2 * nnz // SEGMENT  # a heavy feature has at most twice its entries / SEGMENT segments
    counts = columns.starts.diff()
    first = torch.zeros_like(columns.starts)
    torch.cumsum(torch.where(counts > SEGMENT, (counts + SEGMENT - 1) // SEGMENT, 0), 0, out=first[1:])
    owner = torch.searchsorted(first[1:], torch.arange(most, device=A.device), right=True)
    sums = torch.empty(most, d, device=A.device)
    grid = (most, -(-d // blocks["BLOCK_D"]))
    read = (columns.starts, columns.order, columns.rows, weights, A, first, owner)
    launch(_sum_segments, grid, *read, sums, n_features, d, SEGMENT, **blocks)
    return Heavy(first, sums, True)


def sum_outer(
    columns: Columns,
    weights: Tensor,
    A: Tensor,
    W: Tensor | None = None,
    extra: Extra | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``out[f] = sum over the entries of f of weight * A[row]``, plus what is extra; ``(n_features, d)`` float32."""
    A = A.contiguous()
    n_features, d, blocks = len(columns.starts) - 1, A.shape[1], tile(A.shape[1], _ENTRIES)
    if out is None:
        out = torch.empty(n_features, d, device=A.device)
    check_contiguous(out)
    read, flags = row_arguments(columns, weights, A, out if W is None else W, extra)
    launch(_sum_outer, (n_features, -(-d // blocks["BLOCK_D"])), *read, out, d, **flags, **blocks)
    return out


def row_arguments(
    columns: Columns, weights: Tensor, A: Tensor, W: Tensor, extra: Extra | None
) -> tuple[tuple[Tensor, ...], dict[str, bool]]:
    """What :func:`row_gradient` reads, in its order, and its flags. Something stands in for what there is not."""
    weights = weights.contiguous()
    parts, (at, more, pull) = heavy(columns, weights, A), extra or Extra()
    flags = {
        "HAS_HEAVY": parts.exists,
        "HAS_MORE": at is not None and more is not None and len(more) > 0,
        "HAS_PULL": pull is not None,
    }
    at = columns.starts if at is None else at
    more, pull = A if more is None else more.contiguous(), A if pull is None else pull.contiguous()
    read = (columns.starts, columns.order, columns.rows, weights, A, parts.first, parts.sums, at, more, pull)
    return (*read, W.contiguous()), flags


def sum_over(columns: Columns, weights: Tensor) -> Tensor:
    """``out[f] = sum of the weights of f``, shape ``(n_features,)``, in float32."""
    return _sums(columns, weights, None)


def norm_bound(columns: Columns, weights: Tensor, lengths: Tensor, more: Tensor | None = None) -> Tensor:
    """As :func:`unweave.kernels.gradients.reference.norm_bound`, in float32; it stays on the device."""
    each = _sums(columns, weights, lengths)
    return (each if more is None else each + more).square().sum()


def _sums(columns: Columns, weights: Tensor, lengths: Tensor | None) -> Tensor:
    n_features, weights = len(columns.starts) - 1, weights.contiguous()
    out = torch.empty(n_features, device=weights.device)
    read = (columns.starts, columns.order, columns.rows, weights, weights if lengths is None else lengths.contiguous())
    sizes = {"FEATURES": _FEATURES, "TOGETHER": _TOGETHER, "num_warps": 4}
    launch(_sum_over, (-(-n_features // _FEATURES),), *read, out, n_features, lengths is not None, **sizes)
    return out
