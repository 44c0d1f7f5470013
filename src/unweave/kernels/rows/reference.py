"""What a step does to whole rows."""

from __future__ import annotations

import torch
from torch import Tensor


def centred(rows: Tensor, centre: Tensor, low: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """``rows - centre (n, d)``, the norms of the result ``(n,)``, and, where ``low``, its bfloat16 copy."""
    x = rows - centre
    return x, x.norm(dim=1), x.bfloat16() if low else None


def weighted_sum(A: Tensor, weights: Tensor | None = None) -> Tensor:
    """``sum of weight * A[row]``, shape ``(d,)``, in float32 or better; without weights all of them are 1."""
    if weights is not None:
        return weights @ A.to(weights.dtype)
    return A.sum(0, dtype=torch.float32 if A.dtype == torch.bfloat16 else A.dtype)
