"""The sparsity pattern of a batch of codes, shared by everything that works on the same entries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unweave.kernels.csc.reference import Columns, csc


@dataclass(frozen=True)
class Pattern:
    """Which features have an entry in which row, in CSR form.

    ``columns`` is the same pattern by feature; it is worked out once and shared by the gradients of encoder and
    decoder, which both reduce over the rows of a feature.
    """

    offsets: Tensor  # (n + 1,) int64
    indices: Tensor  # (nnz,) int32
    n_features: int

    @property
    def n_rows(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def rows(self) -> Tensor:
        """``(nnz,)`` int64, the row of each entry."""
        counts = self.offsets.diff()
        return torch.arange(self.n_rows, device=counts.device).repeat_interleave(counts, output_size=len(self.indices))

    @cached_property
    def columns(self) -> Columns:
        return csc(self)

    @property
    def is_crowded(self) -> bool:
        """Whether so many entries are set that dense products pay: one in eight.

        About where gathering rows from memory costs a processor as much as multiplying by all of them. A
        dictionary without a budget may start there.
        """
        return 8 * len(self.indices) > self.n_rows * self.n_features

    def densify(self, values: Tensor) -> Tensor:
        """``(n_rows, n_features)`` with ``values`` at the entries and zeros elsewhere."""
        out = torch.zeros(self.n_rows * self.n_features, dtype=values.dtype, device=values.device)
        out[self.flat] = values
        return out.view(self.n_rows, self.n_features)

    @cached_property
    def flat(self) -> Tensor:
        """``(nnz,)`` int64, where each entry lies in the dense matrix, read row by row."""
        return self.rows * self.n_features + self.indices

    def to(self, device: str | torch.device) -> Pattern:
        return Pattern(self.offsets.to(device), self.indices.to(device), self.n_features)


def concatenate(patterns: list[Pattern]) -> Pattern:
    """Patterns of the same features, one below the other."""
    offsets, base = [patterns[0].offsets[:1]], 0
    for pattern in patterns:
        offsets.append(pattern.offsets[1:] + base)
        base += len(pattern.indices)
    return Pattern(torch.cat(offsets), torch.cat([p.indices for p in patterns]), patterns[0].n_features)
