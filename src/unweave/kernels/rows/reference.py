"""What a step does to whole rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 127  # on either side of zero
SMALLEST = 1e-36  # of a row's largest entry; what is smaller still is taken as zero, for 127 / it has no end


class Quantised(NamedTuple):
    """A matrix in 8 bits: row ``b`` is about ``scales[b] * levels[b]``.

    ``levels (n, d)`` int8; and each ``(n,)``: ``scales``; ``norms`` of the rows as they were; ``lost``, the norms of
    what they are wrong by; and ``vanished``, of that the norms of entries that became 0. (Of rows of next to nothing
    the norms are bounds.)
    """

    levels: Tensor
    scales: Tensor
    norms: Tensor
    lost: Tensor
    vanished: Tensor


def centred(rows: Tensor, centre: Tensor, low: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """``rows - centre (n, d)``, the norms of the result ``(n,)``, and, where ``low``, its bfloat16 copy."""
    x = rows - centre
    return x, x.norm(dim=1), x.bfloat16() if low else None


def weighted_sum(A: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum of weight * A[row]``, shape ``(d,)``, in float32 or better; without weights all of them are 1."""
    if weights is not None:
        return weights @ A.to(weights.dtype)
    return A.sum(0, dtype=torch.float32 if A.dtype == torch.bfloat16 else A.dtype)


def quantised(A: Tensor, columns: Tensor) -> Quantised:
    """The rows of ``A (n, d)``, times ``columns (d,)``, in 8 bits."""
    A = A * columns
    largest = A.abs().amax(1) if A.shape[1] else A.new_zeros(len(A))
    fits = largest > SMALLEST
    scales, inverse = torch.where(fits, largest / LEVELS, 0.0), torch.where(fits, LEVELS / largest, 0.0)
    values = A * inverse[:, None]
    levels = values.round()
    norms = torch.where(fits, scales * values.norm(dim=1), largest * A.shape[1] ** 0.5)
    lost = torch.where(fits, scales * (values - levels).norm(dim=1), norms)
    vanished = torch.where(fits, scales * (values * (levels == 0)).norm(dim=1), norms)
    return Quantised(levels.to(torch.int8), scales, norms, lost, vanished)


def dequantised(sums: Tensor, row_scales: Tensor, column_scales: Tensor, out: Tensor) -> Tensor:
    """``sums (n, m)`` times their rows' and columns' scales, into ``out``."""
    return out.copy_(sums * row_scales[:, None] * column_scales)
