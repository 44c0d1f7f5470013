"""Row gradients and Adam on a GPU, fused: gradients stay in a scratch row per program, which fits the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels._triton import constexpr, jit, launch, n_persistent, tile, tl
from unweave.kernels.adam.gpu import arguments, step_block
from unweave.kernels.adam.reference import AdamStep, Rows
from unweave.kernels.csc.reference import Columns
from unweave.kernels.gradients.gpu import row_arguments, row_gradient
from unweave.kernels.gradients.reference import Extra

_ENTRIES = 4  # rows read at once: most features have few entries


@jit
def _update_rows(
    starts, order, rows, weights, A, heavy_first, heavy_sums, at_extra, more, pull, W, squares,
    first, second, beta1, beta2, rest1, rest2, step_size, correction, eps, shadow, scratch, n_features, d,
    UNIT_NORM: constexpr, HAS_SHADOW: constexpr, HAS_HEAVY: constexpr,
    HAS_MORE: constexpr, HAS_PULL: constexpr,
    BLOCK_E: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """Programs take features in turn; each has one row of ``scratch``, where unit norm needs a row more than once.

    With unit norm a row is gone through three times: its gradient and that one's part along W; Adam; scaling. Without,
    once.
    """
    mine = scratch + tl.program_id(0).to(tl.int64) * d
    feature = tl.program_id(0).to(tl.int64)
    while feature < n_features:
        along = 0.0
        if UNIT_NORM:
            gw, ww = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
            for column in range(0, d, BLOCK_D):
                columns = column + tl.arange(0, BLOCK_D)
                inside = columns < d
                g = row_gradient(
                    starts, order, rows, weights, A, heavy_first, heavy_sums, at_extra, more, pull, W, feature, column,
                    d, HAS_HEAVY, HAS_MORE, HAS_PULL, BLOCK_E, BLOCK_D,
                )  # fmt: skip
                w = tl.load(W + feature * d + columns, mask=inside, other=0.0)
                gw += g * w
                ww += w * w
                tl.store(mine + columns, g, mask=inside)
            along = tl.sum(gw, 0) / tl.maximum(tl.sum(ww, 0), 1e-24)
            tl.debug_barrier()  # what this program's other threads stored is read next
        square, norm = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
        for column in range(0, d, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside, at = columns < d, feature * d + columns
            w = tl.load(W + at, mask=inside, other=0.0)
            if UNIT_NORM:
                g = tl.load(mine + columns, mask=inside, other=0.0) - along * w
            else:
                g = row_gradient(
                    starts, order, rows, weights, A, heavy_first, heavy_sums, at_extra, more, pull, W, feature, column,
                    d, HAS_HEAVY, HAS_MORE, HAS_PULL, BLOCK_E, BLOCK_D,
                )  # fmt: skip
            square += g * g
            w = step_block(w, g, first, second, at, inside, beta1, beta2, rest1, rest2, step_size, correction, eps)
            if UNIT_NORM:
                norm += tl.where(inside, w * w, 0.0)
                tl.store(mine + columns, w, mask=inside)
            else:
                tl.store(W + at, w, mask=inside)
                if HAS_SHADOW:
                    tl.store(shadow + at, w.to(tl.bfloat16), mask=inside)
        tl.store(squares + feature, tl.sum(square, 0))
        if UNIT_NORM:
            scale = 1 / tl.maximum(tl.sqrt(tl.sum(norm, 0)), 1e-12)
            tl.debug_barrier()
            for column in range(0, d, BLOCK_D):
                columns = column + tl.arange(0, BLOCK_D)
                inside, at = columns < d, feature * d + columns
                w = scale * tl.load(mine + columns, mask=inside, other=0.0)
                tl.store(W + at, w, mask=inside)
                if HAS_SHADOW:
                    tl.store(shadow + at, w.to(tl.bfloat16), mask=inside)
            tl.debug_barrier()  # the next feature writes where this one is still being read
        feature += tl.num_programs(0)


def update_rows(
    rows: Rows, columns: Columns, weights: Tensor, A: Tensor, step: AdamStep, extra: Extra | None = None
) -> Tensor:
    """As :func:`unweave.kernels.update.reference.update_rows`, in float32; ``A`` may be bfloat16."""
    A = A.contiguous()
    n_features, d = rows.W.shape
    n_programs = min(n_features, n_persistent(A))
    squares = torch.empty(n_features, device=A.device)
    scratch = torch.empty(n_programs, d if rows.unit_norm else 0, device=A.device)
    W, *state = arguments(rows, step)  # first, so that what is not contiguous is refused
    read, flags = row_arguments(columns, weights, A, W, extra)
    flags |= {"UNIT_NORM": rows.unit_norm, "HAS_SHADOW": rows.shadow is not None}
    launch(_update_rows, (n_programs,), *read, squares, *state, scratch, n_features, d, **flags, **tile(d, _ENTRIES))
    return squares
