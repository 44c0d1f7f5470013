"""Sparse decode on a GPU, alone or in one pass with the residual, the loss and the gradient of every code value."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels._triton import constexpr, jit, launch, tile, tl, weighted_sum, write_dots
from unweave.kernels.pattern import Pattern

_ENTRIES = 8  # atoms read at once


@jit
def _decode(offsets, indices, values, W, out, d, BLOCK_E: constexpr, BLOCK_D: constexpr):
    """One program per row and block of columns."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_D
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = weighted_sum(W, indices, indices, values, start, end, column, d, False, BLOCK_E, BLOCK_D)
    columns = column + tl.arange(0, BLOCK_D)
    tl.store(out + row * d + columns, total, mask=columns < d)


@jit
def _decode_residual(
    offsets, indices, values, W, bias, target, scale, error, grads, squares, d,
    BLOCK_E: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """One program per row: the atoms are read for the error, and again, now from cache, for the gradients."""
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    square = tl.zeros([BLOCK_D], tl.float32)
    for column in range(0, d, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = columns < d
        difference = weighted_sum(W, indices, indices, values, start, end, column, d, False, BLOCK_E, BLOCK_D)
        difference += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        difference -= tl.load(target + row * d + columns, mask=inside, other=0.0).to(tl.float32)
        square += difference * difference
        tl.store(error + row * d + columns, difference * scale, mask=inside)
    tl.store(squares + row, tl.sum(square, 0))
    tl.debug_barrier()  # what this program's other threads stored is read next
    write_dots(error + row * d, W, indices, start, end, grads, d, BLOCK_E, BLOCK_D)


def decode(pattern: Pattern, values: Tensor, W_dec: Tensor) -> Tensor:
    """As :func:`unweave.kernels.decode.reference.decode`, in float32; ``W_dec`` may be bfloat16."""
    d, blocks = W_dec.shape[1], tile(W_dec.shape[1], _ENTRIES)
    out = torch.empty(pattern.n_rows, d, device=W_dec.device)
    grid = (pattern.n_rows, -(-d // blocks["BLOCK_D"]))
    launch(_decode, grid, pattern.offsets, pattern.indices, values.contiguous(), W_dec.contiguous(), out, d, **blocks)
    return out


def decode_residual(
    pattern: Pattern, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`unweave.kernels.decode.reference.decode_residual`, in float32; what is read may be bfloat16."""
    n, d = target.shape
    error = torch.empty(n, d, dtype=W_dec.dtype, device=target.device)
    grads = torch.empty(len(values), device=target.device)
    squares = torch.empty(n, device=target.device)
    read = (
        pattern.offsets,
        pattern.indices,
        values.contiguous(),
        W_dec.contiguous(),
        b_dec,
        target.contiguous(),
        scale,
    )
    launch(_decode_residual, (n,), *read, error, grads, squares, d, **tile(d, _ENTRIES))
    return error, grads, squares
