"""On a GPU, torch's own operations are as good as any."""

from __future__ import annotations

from unweave.kernels.rows.reference import centred as centred
from unweave.kernels.rows.reference import dequantised as dequantised
from unweave.kernels.rows.reference import quantised as quantised
from unweave.kernels.rows.reference import weighted_sum as weighted_sum
