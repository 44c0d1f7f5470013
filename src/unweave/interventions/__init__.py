"""What one does to a forward pass: splice, ablate, reconstruct."""

from __future__ import annotations

from unweave.interventions.edits import CodeEdit, RowEdit, ablate_mean, ablate_zero, reconstruct
from unweave.interventions.splice import splice

__all__ = ["CodeEdit", "RowEdit", "ablate_mean", "ablate_zero", "reconstruct", "splice"]
