"""Nested reconstructions on a GPU: one program per row adds the entries, sorted by group, to a running difference."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels._triton import constexpr, jit, launch, tile, tl, weighted_sum, write_dots
from unweave.kernels.pattern import Pattern
from unweave.kernels.prefixes.reference import group_of

_ENTRIES = 8  # atoms read at once


@jit
def _decode_prefixes(
    starts, indices, values, W, bias, target, scales, errors, grads, squares, d, n_groups,
    BLOCK_E: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """``starts[row * n_groups + g]``: the first entry of a row in group g."""
    row = tl.program_id(0).to(tl.int64)
    own = errors + row * n_groups * d
    for column in range(0, d, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside = columns < d
        running = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        running -= tl.load(target + row * d + columns, mask=inside, other=0.0).to(tl.float32)
        for g in range(n_groups):
            segment = starts + row * n_groups + g
            start, end = tl.load(segment), tl.load(segment + 1)
            running += weighted_sum(W, indices, indices, values, start, end, column, d, False, BLOCK_E, BLOCK_D)
            tl.store(own + g * d + columns, running, mask=inside)
            # One number a program: whoever stored it reads it again.
            square = tl.sum(tl.where(inside, running * running, 0.0), 0)
            before = tl.load(squares + row * n_groups + g) if column > 0 else 0.0
            tl.store(squares + row * n_groups + g, before + square)
            tl.debug_barrier()
        longer = tl.zeros([BLOCK_D], tl.float32)
        for back in range(n_groups):  # a feature answers for its own prefix and every longer one
            g = n_groups - 1 - back
            longer += tl.load(scales + g) * tl.load(own + g * d + columns, mask=inside, other=0.0)
            tl.store(own + g * d + columns, longer, mask=inside)
    tl.debug_barrier()  # what this program's other threads stored is read next
    for g in range(n_groups):
        segment = starts + row * n_groups + g
        write_dots(own + g * d, W, indices, tl.load(segment), tl.load(segment + 1), grads, d, BLOCK_E, BLOCK_D)


def decode_prefixes(
    pattern: Pattern, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, ends: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`unweave.kernels.prefixes.reference.decode_prefixes`, in float32; what is read may be bfloat16."""
    n, d = target.shape
    n_groups, device = len(ends), target.device
    errors, squares = torch.empty(n, n_groups, d, device=device), torch.empty(n, n_groups, device=device)
    segments, order = torch.sort(pattern.rows * n_groups + group_of(pattern, ends), stable=True)
    starts = torch.searchsorted(segments, torch.arange(n * n_groups + 1, device=device))
    sorted_grads = torch.empty(len(values), device=device)
    read = (
        starts,
        pattern.indices[order],
        values[order],
        W_dec.contiguous(),
        b_dec,
        target.contiguous(),
        scales.float().contiguous(),
    )
    launch(_decode_prefixes, (n,), *read, errors, sorted_grads, squares, d, n_groups, **tile(d, _ENTRIES))
    return errors, torch.empty_like(sorted_grads).index_copy_(0, order, sorted_grads), squares
