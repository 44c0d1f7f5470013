"""What is measured between two lines of the log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unweave.metrics import ReconstructionSums

# Measuring FVU in float64 costs up to half a step; 16,000 rows pin it down to a percent. Where a window is short, an
# eighth of it has to do, or 2,000 rows if that is more.
_FVU_ROWS, _FEWEST_FVU_ROWS, _FVU_SHARE = 2**14, 2**11, 1 / 8


class Window:
    """Means of the loss and its terms over a log window, and the FVU of the window's last batches.

    The whole state can be saved, so a run resumed in the middle of a window logs the line it would have logged.
    """

    def __init__(self, d_out: int, log_steps: int, n_steps: int, batch_size: int) -> None:
        self._d_out, self._log_steps, self._n_steps = d_out, log_steps, n_steps
        rows = min(_FVU_ROWS, max(_FEWEST_FVU_ROWS, round(_FVU_SHARE * log_steps * batch_size)))
        self._fvu_batches = math.ceil(rows / batch_size)
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name: [sum, count]
        self._fit = ReconstructionSums(self._d_out)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            entry = self._sums.setdefault(name, [0.0, 0])
            entry[0] += value
            entry[1] += 1

    def ends_after(self, step: int) -> bool:
        """Whether a line is due once ``step`` (counted from 0) is done."""
        return (step + 1) % self._log_steps == 0 or step + 1 == self._n_steps

    def wants_rows(self, step: int) -> bool:
        """Whether the rows of ``step`` count for the FVU."""
        end = min(self._n_steps, (step // self._log_steps + 1) * self._log_steps)
        return end - step <= self._fvu_batches

    def add_rows(self, target: Tensor, reconstruction: Tensor) -> None:
        self._fit.add(target, reconstruction)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._sums.items()}

    def fvu(self) -> float:
        return self._fit.values()["fvu"]

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "fit": self._fit.state_dict()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sums = state["sums"]
        self._fit.load_state_dict({name: value.to(device) for name, value in state["fit"].items()})
