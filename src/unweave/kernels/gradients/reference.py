"""The two sparse products from which every gradient of a sparse dictionary is made."""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.kernels.csc.reference import Columns
from unweave.kernels.pattern import Pattern

_BLOCK = 2048  # entries at a time: the gathered (block, d) tensors stay in cache


def gather_dot(pattern: Pattern, A: Tensor, W: Tensor) -> Tensor:
    """``out[e] = A[row of e] . W[feature of e]`` for every entry, shape ``(nnz,)``."""
    if pattern.is_crowded:
        return (A @ W.T).reshape(-1)[pattern.flat]
    if _has_sampled_product(A):
        _accept_beta_notice()
        zeros = A.new_zeros(len(pattern.indices))
        shape = (len(A), len(W))
        entries = torch.sparse_csr_tensor(pattern.offsets, pattern.indices.long(), zeros, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(entries, A, W.T, beta=0.0).values()
    out = A.new_empty(len(pattern.indices))
    for i in range(0, len(out), _BLOCK):
        rows, features = pattern.rows[i : i + _BLOCK], pattern.indices[i : i + _BLOCK].long()
        torch.linalg.vecdot(A.index_select(0, rows), W.index_select(0, features), out=out[i : i + _BLOCK])
    return out


def _has_sampled_product(A: Tensor) -> bool:
    """torch multiplies at chosen entries only with MKL or CUDA, in float32 and float64."""
    here = A.is_cuda or (A.device.type == "cpu" and torch.backends.mkl.is_available())
    return here and A.dtype in (torch.float32, torch.float64)


@cache
def _accept_beta_notice() -> None:
    """torch announces once per process that CSR tensors are in beta; users of ours need not read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


def scatter_outer(pattern: Pattern, values: Tensor, A: Tensor) -> Tensor:
    """``out[f] = sum over the entries of feature f of value * A[row]``, shape ``(n_features, d)``."""
    values = values.to(A.dtype)
    if pattern.is_crowded:
        return pattern.densify(values).T @ A
    return sum_outer(pattern.columns, values, A)


class Extra(NamedTuple):
    """Parts of a row gradient that come from elsewhere than the entries of the code.

    Attributes:
        at: ``(n_features,)`` int64, which row of ``rows`` belongs to a feature, or -1; None without such rows.
        rows: ``(r, d)``, added as they are (of an auxiliary loss on a few features, say).
        pull: ``(n_features,)``, how much of the weight row itself is added (of a penalty on norms); None for none.
    """

    at: Tensor | None = None
    rows: Tensor | None = None
    pull: Tensor | None = None


def sum_outer(
    columns: Columns, weights: Tensor, A: Tensor, W: Tensor | None = None, extra: Extra | None = None
) -> Tensor:
    """``out[f] = sum over the entries of feature f of weight * A[row]``, plus what is extra; ``(n_features, d)``."""
    # The transposed code times a dense matrix is a decode by columns, and embedding_bag sums it without forming
    # the (nnz, d) products.
    weights = weights.to(A.dtype)[columns.order]
    out = F.embedding_bag(columns.rows, A, columns.starts[:-1], mode="sum", per_sample_weights=weights)
    if extra is not None and extra.at is not None and extra.rows is not None:
        here = (extra.at >= 0).nonzero().squeeze(1)
        out[here] += extra.rows[extra.at[here]]
    if extra is not None and extra.pull is not None and W is not None:
        out += extra.pull[:, None] * W
    return out


def sum_by_feature(pattern: Pattern, values: Tensor) -> Tensor:
    """``out[f] = sum of the values of feature f``, shape ``(n_features,)``."""
    out = torch.zeros(pattern.n_features, dtype=values.dtype, device=values.device)
    return out.index_add_(0, pattern.indices.long(), values)


def sum_over(columns: Columns, weights: Tensor) -> Tensor:
    """The same from the entries sorted by feature."""
    out = torch.zeros(len(columns.starts) - 1, dtype=weights.dtype, device=weights.device)
    features = torch.arange(len(out), device=out.device).repeat_interleave(columns.starts.diff())
    return out.index_add_(0, features, weights[columns.order])


def norm_bound(columns: Columns, weights: Tensor, lengths: Tensor, more: Tensor | None = None) -> Tensor:
    """At least the squared norm of ``G[f] = sum over the entries of f of weight * A[row]``.

    Each feature's rows at their full length, all pointing one way.

    Args:
        lengths: ``(n,)``, norms of the rows of A. more: ``(n_features,)``, to add to each feature's length.
    """
    each = sum_over(columns, (weights.abs() * lengths[columns.rows[columns.order.argsort()]]))
    return (each if more is None else each + more).square().sum()
