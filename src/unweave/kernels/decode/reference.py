"""Sparse decode, a weighted sum of rows of ``W_dec``. The dense code is formed only where that is cheaper."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from unweave.kernels.gradients.reference import gather_dot
from unweave.kernels.pattern import Pattern


def decode(pattern: Pattern, values: Tensor, W_dec: Tensor) -> Tensor:
    """``out[i] = sum over the entries of row i of value * W_dec[feature]``, shape ``(n, d_out)``."""
    values = values.to(W_dec.dtype)
    if pattern.is_crowded:
        return pattern.densify(values) @ W_dec
    return F.embedding_bag(pattern.indices.long(), W_dec, pattern.offsets[:-1], mode="sum", per_sample_weights=values)


def decode_residual(
    pattern: Pattern, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruct, compare, and go back to the code: the middle of a training step without autograd.

    Args:
        values: ``(nnz,)``. W_dec: ``(n_features, d)``. b_dec: ``(d,)``. target: ``(n, d)``.
        scale: of the gradient: 2 / n for a squared error averaged over n rows.

    Returns:
        ``error (n, d) = scale (x_hat - target)``, the gradient of the reconstruction, in the type of W_dec;
        ``grads (nnz,)``, that gradient at every code value, ``error[row] . W_dec[feature]``;
        ``squares (n,) = ||x_hat - target||^2``.
    """
    W = W_dec.to(values.dtype)
    difference = decode(pattern, values, W) + b_dec - target
    error = difference * scale
    return error.to(W_dec.dtype), gather_dot(pattern, error, W), difference.square().sum(1)
