"""What is known about the error of bfloat16 scores."""

from __future__ import annotations

import math


class Screen:
    """How wrong bfloat16 scores have been so far, which is how wide the next screen's margin is.

    Attributes:
        tolerance: largest error seen, per unit of row norm, beyond the rounding of the score itself; with a reserve.
        n_redone: rows that met a larger error than their margin and were done again with a wider one.
        n_rows: rows screened.
    """

    def __init__(self) -> None:
        self.tolerance, self.n_redone, self.n_rows = 2e-3, 0, 0

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
