"""Sparse decode on a CPU, alone or in one pass with the residual, the loss and the gradient of every code value."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unweave.kernels._jit import array, dots, inline, jit, run, widen, write_row
from unweave.kernels.pattern import Pattern


@inline
def _add_atoms(out, values, indices, W, start, end):
    """``out += values[e] * W[indices[e]]``, four atoms at a time."""
    e, d = start, len(out)
    while e + 4 <= end:
        w0, w1, w2, w3 = W[indices[e]], W[indices[e + 1]], W[indices[e + 2]], W[indices[e + 3]]
        v0, v1, v2, v3 = values[e], values[e + 1], values[e + 2], values[e + 3]
        for j in range(d):
            out[j] += v0 * widen(w0[j]) + v1 * widen(w1[j]) + v2 * widen(w2[j]) + v3 * widen(w3[j])
        e += 4
    while e < end:
        w, v = W[indices[e]], values[e]
        for j in range(d):
            out[j] += v * widen(w[j])
        e += 1


@jit
def _decode(lo, hi, offsets, indices, values, W, out):
    for b in range(lo, hi):
        out[b] = np.float32(0)
        _add_atoms(out[b], values, indices, W, offsets[b], offsets[b + 1])


@jit
def _decode_residual(lo, hi, offsets, indices, values, W, bias, target, scale, error, grads, squares):
    d = len(bias)
    row = np.empty(d, np.float32)
    for b in range(lo, hi):
        wanted = target[b]
        for j in range(d):
            row[j] = bias[j] - wanted[j]
        _add_atoms(row, values, indices, W, offsets[b], offsets[b + 1])
        total = np.float32(0)
        for j in range(d):
            total += row[j] * row[j]
        squares[b] = total
        for j in range(d):
            row[j] *= scale
        write_row(error[b], row)
        # The atoms were read a moment ago: this second pass finds them in cache.
        dots(row, W, indices, offsets[b], offsets[b + 1], grads)


def decode(pattern: Pattern, values: Tensor, W_dec: Tensor) -> Tensor:
    """As :func:`unweave.kernels.decode.reference.decode`, in float32; ``W_dec`` may be bfloat16."""
    out = torch.empty(pattern.n_rows, W_dec.shape[1])
    work = len(values) / max(1, len(out)) * W_dec.shape[1]
    run(_decode, pattern.n_rows, *map(array, (pattern.offsets, pattern.indices, values, W_dec, out)), work=work)
    return out


def decode_residual(
    pattern: Pattern, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`unweave.kernels.decode.reference.decode_residual`, in float32; ``W_dec`` may be bfloat16."""
    error, grads = torch.empty(target.shape, dtype=W_dec.dtype), torch.empty(len(values))
    squares = torch.empty(len(target))
    read = map(array, (pattern.offsets, pattern.indices, values, W_dec, b_dec, target))
    n, d = target.shape
    work = 2 * (1 + len(values) / max(1, n)) * d
    run(_decode_residual, pattern.n_rows, *read, np.float32(scale), *map(array, (error, grads, squares)), work=work)
    return error, grads, squares
