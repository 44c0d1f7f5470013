"""Sparse decode, a weighted sum of rows of ``W_dec``. The dense code is formed only where that is cheaper."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from unweave.kernels.pattern import Pattern


def decode(pattern: Pattern, values: Tensor, W_dec: Tensor) -> Tensor:
    """``out[i] = sum over the entries of row i of value * W_dec[feature]``, shape ``(n, d_out)``."""
    values = values.to(W_dec.dtype)
    if pattern.is_crowded:
        return pattern.densify(values) @ W_dec
    return F.embedding_bag(pattern.indices.long(), W_dec, pattern.offsets[:-1], mode="sum", per_sample_weights=values)
