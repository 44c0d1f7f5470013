"""The two sparse products from which every gradient of a sparse dictionary is made."""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

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
    # The transposed code times a dense matrix is a decode by columns, and embedding_bag sums it without forming
    # the (nnz, d) products.
    columns = pattern.columns
    return F.embedding_bag(columns.rows, A, columns.starts[:-1], mode="sum", per_sample_weights=values[columns.order])


def sum_by_feature(pattern: Pattern, values: Tensor) -> Tensor:
    """``out[f] = sum of the values of feature f``, shape ``(n_features,)``."""
    out = torch.zeros(pattern.n_features, dtype=values.dtype, device=values.device)
    return out.index_add_(0, pattern.indices.long(), values)
