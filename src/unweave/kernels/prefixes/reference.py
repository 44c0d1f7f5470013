"""The losses of nested prefixes and their way back to the code, in one pass over the entries.

Source: Bussmann et al. 2025, Learning multi-level features with Matryoshka sparse autoencoders, arXiv:2503.17547.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.decode.reference import decode
from unweave.kernels.gradients.reference import gather_dot
from unweave.kernels.pattern import Pattern


def decode_prefixes(
    pattern: Pattern, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, ends: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruct from each prefix of the features, compare, and go back to the code.

    Prefix ``g`` holds the features below ``ends[g]``; feature f first counts in its own group, the smallest prefix
    that holds it, and in all longer ones.

    Args:
        values: ``(nnz,)``. W_dec: ``(n_features, d)``. b_dec: ``(d,)``. target: ``(n, d)``.
        ends: ``(g,)`` int64, rising, the last one n_features.
        scales: ``(g,)``, of each prefix's gradient: 2 / n times its weight in the loss.

    Returns:
        ``errors (n, g, d)``: what reaches the features of group g from their own and all longer prefixes, so that the
        decoder's gradient is ``sum value * errors[row, group]``; ``grads (nnz,)``, the loss by each code value;
        ``squares (n, g) = ||x_hat_g - target||^2``.
    """
    group = group_of(pattern, ends)
    differences = []
    for g in range(len(ends)):
        within = values * (group <= g)
        differences.append(decode(pattern, within, W_dec) + b_dec - target)
    stacked = torch.stack(differences, 1)
    scaled = stacked * scales[None, :, None]
    errors = scaled.flip(1).cumsum(1).flip(1)
    grads = values.new_zeros(len(values))
    for g in range(len(ends)):
        grads = torch.where(group == g, gather_dot(pattern, errors[:, g].contiguous(), W_dec), grads)
    return errors, grads, stacked.square().sum(2)


def group_of(pattern: Pattern, ends: Tensor) -> Tensor:
    """``(nnz,)`` int64, the smallest prefix that holds each entry's feature."""
    return torch.searchsorted(ends, pattern.indices.long(), right=True)
