"""Products in 8 bits: rough scores for a screen to look at, where processors multiply whole numbers fastest.

Rows and weights are rounded to 255 levels, each with a scale of its own, and multiplied by the VNNI or AMX
instructions. A score is wrong by about a hundredth of what scores spread by, so some more features than with bfloat16
are worked out again in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unweave.kernels.multiply import multiply
from unweave.kernels.rows.reference import Quantised
from unweave.kernels.threads import serial

LONGEST = 2**17  # d, of which products still add up in 32 bits: 2^31 / 127^2, less a little
_SAMPLE = 64  # rows or some more, that tell how large the columns are
_SUMS = 1e-6  # what float32 sums lose, as a share of the norms multiplied
_COARSE = 0.6  # of what a row lost: where more than that is of entries that vanished, the loss is no noise
_MANY = 0.25  # coarse ones of all: then float32 is as good for the others


@cache
def why_not() -> str | None:
    """Why 8 bits cannot be used here; None when they can."""
    if not hasattr(torch.ops.aten, "_int_mm") or not torch.backends.mkldnn.is_available():
        return "this torch has no fast product in int8"
    tell = getattr(torch.cpu, "get_capabilities", None)  # of newer torches
    found = tell() if tell is not None else {"avx512_vnni": torch.cpu._is_vnni_supported()}
    if not (found.get("avx512_vnni") or found.get("amx_int8")):
        return "the processor has neither AVX512-VNNI nor AMX, without which sums of int8 products may not fit"
    return None


class Rough(NamedTuple):
    """Rough scores, and how wrong they may be.

    Attributes:
        scores: ``(n, n_features)``, bfloat16.
        norms, lost: ``(n,)``, of the rows, and of what rounding took from them.
        W: the encoder they were made with.
    """

    scores: Tensor
    norms: Tensor
    lost: Tensor
    W: Quantised

    def lengths(self, of: slice = slice(None)) -> Tensor:
        """``(n,)``: what the errors of a row's scores, by some of the features, spread by, or somewhat more.

        Errors of rounding point anywhere, so a score meets ``d^-0.5`` of their norm.
        """
        norms, lost = self.W.norms[of], self.W.lost[of]
        longest, furthest = (float(each.max()) if len(each) else 0.0 for each in (norms, lost))
        with serial(self.norms):
            spread = torch.hypot(self.lost * longest, self.norms * furthest) * self.W.levels.shape[1] ** -0.5
            return spread + _SUMS * longest * self.norms


class Int8Product:
    """An encoder in 8 bits, as it is now, to make rough scores with.

    Columns of very different size would leave the small ones few levels. What columns of the rows are larger by, the
    square root of it, is moved to the weights; the product stays the same. Where one entry of a row is so much larger
    than the others that these vanish, what is lost is no noise but the row itself: such rows, and features, are
    multiplied in float32.
    """

    def __init__(self, ops: Any, x: Tensor, W: Tensor) -> None:
        """
        Args:
            ops: a backend's ``rows``. x: ``(n, d)``, rows like those that will be multiplied. W: ``(n_features, d)``.
        """
        columns = _column_sizes(x)
        self._ops, self._exact, self._inverse = ops, W, 1 / columns
        self.W: Quantised = ops.quantised(W, columns)
        self._features = _coarse(self.W)
        self.W.lost[self._features] = 0

    def scores(self, x: Tensor, place: Callable[[torch.dtype], Tensor]) -> Rough:
        """``x W^T``, roughly.

        Args:
            x: ``(n, d)``.
            place: gives contiguous memory ``(n, n_features)`` of a type.
        """
        rows, out, W = self._ops.quantised(x, self._inverse), place(torch.bfloat16), self._exact
        coarse = _coarse(rows)
        if len(coarse) > _MANY * len(x) or len(self._features) > _MANY * len(W):
            exact = self.W._replace(lost=torch.zeros_like(self.W.lost))
            out.copy_(multiply(x, W, lambda: place(x.dtype)))
            return Rough(out, rows.norms, torch.zeros_like(rows.lost), exact)
        sums = torch.ops.aten._int_mm.out(rows.levels, self.W.levels.T, out=place(torch.int32))
        self._ops.dequantised(sums, rows.scales, self.W.scales, out)
        if len(coarse):
            out[coarse] = (x[coarse] @ W.T).to(out.dtype)
            rows.lost[coarse] = 0
        if len(self._features):
            out[:, self._features] = (x @ W[self._features].T).to(out.dtype)
        return Rough(out, rows.norms, rows.lost, self.W)


def _coarse(A: Quantised) -> Tensor:
    """The rows of which too much vanished."""
    with serial(A.lost):
        return (A.vanished > _COARSE * A.lost).nonzero().squeeze(1)


def _column_sizes(x: Tensor) -> Tensor:
    """``(d,)``: the square root of each column's share of a row, over some of the rows; about 1."""
    sample = x[:: max(1, len(x) // _SAMPLE)]
    with serial(sample):
        shares = sample.abs() / sample.abs().sum(1, keepdim=True)
        # A column that is quiet in the sample is not stretched without end: it may be loud in another row.
        sizes = (shares.nanmean(0) * x.shape[1]).clamp_min(1e-2).sqrt()
        return torch.where(sizes.isfinite(), sizes, 1.0)
