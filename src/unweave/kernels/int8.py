"""Products in 8 bits: rough scores at twice the speed of bfloat16, for a screen to look at.

Rows and weights are rounded to 255 levels, each with a scale of its own, and multiplied in whole numbers, which the
VNNI and AMX instructions of processors since 2019 do. A score is wrong by about a hundredth of what scores spread by,
so some more features than with bfloat16 are worked out again in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unweave.kernels.rows.reference import Quantised
from unweave.kernels.threads import serial

LONGEST = 2**17  # d, of which products still add up in 32 bits: 2^31 / 127^2, less a little
_SAMPLE = 64  # rows that tell how large the columns are
_SUMS = 1e-6  # what float32 sums lose, as a share of the norms multiplied


@cache
def why_not() -> str | None:
    """Why 8 bits are of no use here; None when they are."""
    if not (hasattr(torch.ops.aten, "_int_mm") and hasattr(torch.cpu, "get_capabilities")):
        return "this torch has no product in int8, or does not tell what the processor can do"
    found = torch.cpu.get_capabilities()
    if not (found.get("avx512_vnni") or found.get("amx_int8")):
        return "the processor multiplies int8 no faster than float32 (no AVX512-VNNI, no AMX)"
    return None


class Int8Product:
    """An encoder in 8 bits, as it is now, and the rough scores of rows by it.

    Columns of very different size would leave the small ones few levels. What columns of the rows are larger by, the
    square root of it, is moved to the weights; the product stays the same.
    """

    def __init__(self, ops: Any, x: Tensor, W: Tensor) -> None:
        """
        Args:
            ops: a backend's ``rows``. x: ``(n, d)``, rows like those that will be multiplied. W: ``(n_features, d)``.
        """
        self._ops = ops
        columns = _column_sizes(x)
        self._inverse = 1 / columns
        self.W: Quantised = ops.quantised(W, columns)

    def rows(self, x: Tensor) -> Quantised:
        """Rows ``(n, d)`` as :meth:`scores` takes them."""
        return self._ops.quantised(x, self._inverse)

    def scores(self, rows: Quantised, place: Callable[[torch.dtype], Tensor]) -> Tensor:
        """``(n, n_features)``, bfloat16.

        Args:
            place: gives contiguous memory of that shape and of a type.
        """
        sums = torch.ops.aten._int_mm.out(rows.levels, self.W.levels.T, out=place(torch.int32))
        return self._ops.dequantised(sums, rows.scales, self.W.scales, place(torch.bfloat16))

    def lengths(self, rows: Quantised, of: slice = slice(None)) -> Tensor:
        """``(n,)``: what the errors of a row's scores, by some of the features, are in proportion to."""
        longest, furthest = (float(norms[of].max()) if len(norms[of]) else 0.0 for norms in (self.W.norms, self.W.lost))
        with serial(rows.norms):
            return torch.hypot(rows.lost * longest, rows.norms * furthest) + _SUMS * longest * rows.norms


def _column_sizes(x: Tensor) -> Tensor:
    """``(d,)``: the square root of each column's share of a row, over some of the rows; about 1."""
    with serial(x[:_SAMPLE]):
        sample = x[:: max(1, len(x) // _SAMPLE)].abs()
        shares = (sample / sample.sum(1, keepdim=True)).nanmean(0) * x.shape[1]
        return torch.where(shares.isfinite() & (shares > 1e-6), shares, 1.0).sqrt()
