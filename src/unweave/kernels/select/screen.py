"""What is known about the error of rough scores."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

_ROUNDING = 2.0**-8  # of bfloat16


class Screen:
    """How wrong rough scores have been so far, which is how wide the next screen's margin is.

    Attributes:
        tolerance: largest error seen, beyond the rounding of the score itself, per unit of what it is in proportion to
            (for bfloat16 a row's norm, for int8 :meth:`~unweave.kernels.int8.Rough.lengths`); with a reserve.
        n_redone: rows that met a larger error than their margin and were done again with a wider one.
        n_rows: rows screened.
    """

    def __init__(self, tolerance: float = 2e-3) -> None:
        self.tolerance, self.n_redone, self.n_rows = tolerance, 0, 0

    def update(self, worst: float, n_redone: int, n_rows: int) -> None:
        if not math.isfinite(worst):
            return  # a broken batch says nothing about rounding
        # Follow a falling error slowly and a rising one at once.
        self.tolerance = float(max(1.5 * worst, 0.9 * self.tolerance))
        self.n_redone += n_redone
        self.n_rows += n_rows

    def state_dict(self) -> dict[str, float]:
        return {"tolerance": self.tolerance, "n_redone": self.n_redone, "n_rows": self.n_rows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.tolerance, self.n_redone = float(state["tolerance"]), int(state["n_redone"])
        self.n_rows = int(state["n_rows"])


class CertifiedScreen(Screen):
    """Margins from :func:`largest_errors`, which nothing exceeds: there is nothing to learn."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def update(self, worst: float, n_redone: int, n_rows: int) -> None:
        self.n_redone += n_redone
        self.n_rows += n_rows

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict({**state, "tolerance": 1.0})  # whatever another kind of screen had learned


def largest_errors(ops: Any, x: Tensor, low: Tensor, W: Tensor, shadow: Tensor) -> Tensor:
    """``(n,)``: by how much any bfloat16 score of a row can differ from the float32 one, beyond its own rounding.

    With ``x`` and ``W`` rounded to ``x'`` and ``W'``, a score is wrong by ``(x - x') W + x' (W - W')`` and by what the
    float32 sums of both products lose, in whatever order they are made: at most ``|x - x'| |W|`` and so on, with norms
    that are measured. Products too small for float32's full precision, below 1e-38, are left out of account.

    Args:
        ops: the module that measures: ``select.reference`` or ``select.cpu``.
        x: ``(n, d)``. W: ``(n_features, d)``. low, shadow: their bfloat16 copies.
    """
    norms, lost = ops.rounding_errors(x, low)
    longest, furthest = (float(of.max()) if len(of) else 0.0 for of in ops.rounding_errors(W, shadow))
    sums = 4 * (x.shape[1] + 8) * 2.0**-24  # two sums of as many products each; twice, for what bounds leave out
    return (lost * longest + norms * ((1 + _ROUNDING) * furthest + sums * longest)).float()
