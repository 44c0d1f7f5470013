"""Differentiable sparse encode and decode: the kernels behind ``torch.autograd.Function``.

Neither direction forms a dense ``(n, n_features)`` gradient. Selection itself is not differentiated: the pattern is
given, and values at its entries carry the gradient.
"""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.kernels.backend import Backend, backend, fastest
from unweave.kernels.csc.reference import Columns
from unweave.kernels.decode.reference import decode as decode_reference
from unweave.kernels.gradients.reference import gather_dot as gather_dot_reference
from unweave.kernels.gradients.reference import scatter_outer, sum_by_feature
from unweave.kernels.pattern import Pattern


def _ops(pattern: Pattern, *tensors: Tensor) -> Backend | None:
    """The compiled kernels for these tensors; None where the reference (dense, if the code is crowded) serves them."""
    ops = fastest(tensors[0])
    same = all(t.dtype == tensors[0].dtype and t.device == tensors[0].device for t in tensors)
    return None if pattern.is_crowded or ops is backend("reference") or not same else ops


def _decode(pattern: Pattern, values: Tensor, W: Tensor) -> Tensor:
    if (ops := _ops(pattern, values, W)) is None:
        return decode_reference(pattern, values, W)
    return ops.decode.decode(pattern, values.contiguous(), W.contiguous())


def _gather_dot(pattern: Pattern, A: Tensor, W: Tensor) -> Tensor:
    if (ops := _ops(pattern, A, W)) is None:
        return gather_dot_reference(pattern, A, W)
    return ops.gradients.gather_dot(pattern, A.contiguous(), W.contiguous())


def outer_sums(pattern: Pattern, values: Tensor, A: Tensor) -> Tensor:
    """``out[f] = sum over the entries of feature f of value * A[row]``, shape ``(n_features, d)``; no gradient."""
    if (ops := _ops(pattern, values, A)) is None:
        return scatter_outer(pattern, values, A)
    columns: Columns = pattern.columns
    return ops.gradients.sum_outer(columns, values.contiguous(), A.contiguous())


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(x, W_enc)
        return scores.reshape(-1)[pattern.flat]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), pattern = grads, ctx.pattern
        x, W_enc = ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        grad_x = _decode(pattern, grad, W_enc) if need_x else None
        grad_W = outer_sums(pattern, grad, x) if need_W else None
        grad_b = sum_by_feature(pattern, grad) if need_b else None
        return grad_x, grad_W, grad_b, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(values, W_dec)
        return _decode(pattern, values, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), pattern = grads, ctx.pattern
        values, W_dec = ctx.saved_tensors
        need_values, need_W = ctx.needs_input_grad[:2]
        grad_values = _gather_dot(pattern, grad, W_dec) if need_values else None
        grad_W = outer_sums(pattern, values, grad) if need_W else None
        return grad_values, grad_W, None


def sparse_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
    """The pre-activations ``x @ W_enc.T + b_enc`` at the entries of ``pattern``, shape ``(nnz,)``.

    Args:
        x: ``(n, d)`` input after any bias was subtracted.
        W_enc: ``(n_features, d)``. b_enc: ``(n_features,)``.
        scores: ``(n, n_features)``, the same pre-activations, already worked out without a graph.
        pattern: the selected entries.
    """
    out: Any = _SparseEncode.apply(x, W_enc, b_enc, scores, pattern)
    return out


def sparse_decode(values: Tensor, W_dec: Tensor, pattern: Pattern) -> Tensor:
    """``(n, d_out)`` reconstruction without bias, differentiable in ``values`` and ``W_dec``."""
    out: Any = _SparseDecode.apply(values, W_dec, pattern)
    return out
