"""Matching pursuit on a GPU: after one product a pick costs one pass over the row's correlations (see ``cpu.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.kernels._triton import constexpr, jit, launch, power_of_two, tl
from unweave.kernels.pattern import Pattern
from unweave.kernels.pursuit import check, noise, nothing, packed
from unweave.kernels.pursuit.nonnegative import nonnegative_pursuit as nonnegative_pursuit
from unweave.kernels.pursuit.reference import orthogonal_matching_pursuit as orthogonal_matching_pursuit

_BLOCK = 1024
_ROOM = 2**28  # correlations worked out at a time (1 GB)
_FLOOR = noise(torch.float32)


@jit
def _strength(c, SIGNED: constexpr):
    """What is compared: atoms that may not be picked again have minus infinity for a correlation."""
    if SIGNED:
        c = tl.where(c == -float("inf"), c, tl.abs(c))
    return c


@jit
def _pursue(
    X, W, C, gram, residual, indices, values, counts, trail, tolerance, d, m, k,
    SIGNED: constexpr, DISTINCT: constexpr, UNTIL_REPEAT: constexpr, HAS_TRAIL: constexpr, HAS_TOLERANCE: constexpr,
    WIDTH: constexpr, BLOCK: constexpr, BLOCK_D: constexpr, FLOOR: constexpr,
):  # fmt: skip
    """One program per row of ``C = X W^T``, which is used up. ``WIDTH``: lanes for the row's entries, at least k."""
    row = tl.program_id(0).to(tl.int64)
    c_row, lanes, size = C + row * m, tl.arange(0, WIDTH), 0.0
    for column in range(0, d, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        x = tl.load(X + row * d + columns, mask=columns < d, other=0.0)
        size += tl.sum(x * x, 0)
        if HAS_TOLERANCE:
            tl.store(residual + row * d + columns, x, mask=columns < d)
    floor, left = FLOOR * tl.sqrt(size), tl.sqrt(size)
    found, amount = tl.full([WIDTH], -1, tl.int32), tl.zeros([WIDTH], tl.float32)
    count, picks, v, j, going = 0, 0, 0.0, tl.zeros([], tl.int64), True
    while going:
        # One pass takes the last pick off and finds the next one: each lane keeps the first best of its columns.
        best, where = tl.full([BLOCK], -float("inf"), tl.float32), tl.full([BLOCK], 2**31 - 1, tl.int32)
        for at in range(0, m, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            inside = columns < m
            c = tl.load(c_row + columns, mask=inside, other=-float("inf"))
            if picks > 0:
                c -= v * tl.load(gram + j * m + columns, mask=inside, other=0.0).to(tl.float32)
                if DISTINCT:
                    c = tl.where(columns == j, -float("inf"), c)
                tl.store(c_row + columns, c, mask=inside)
            strength = _strength(c, SIGNED)
            where = tl.where(strength > best, columns, where)
            best = tl.where(strength > best, strength, best)
        top = tl.max(best, 0)
        going = (picks < k) & (top > floor)
        if HAS_TOLERANCE:
            going = going & (left > tolerance)
        if going:
            j = tl.min(tl.where(best == top, where, 2**31 - 1), 0).to(tl.int64)
            tl.debug_barrier()  # the correlation was stored by another thread
            v = tl.load(c_row + j)
            again = found == j.to(tl.int32)
            is_new = tl.sum(again.to(tl.int32), 0) == 0
            mine = again | (is_new & (lanes == count))
            found, amount = tl.where(mine, j.to(tl.int32), found), tl.where(mine, amount + v, amount)
            count, picks = count + is_new.to(tl.int32), picks + 1
            if HAS_TRAIL:
                tl.store(trail + row * k + picks - 1, j.to(tl.int32))
            if UNTIL_REPEAT:
                going = is_new
            if HAS_TOLERANCE:
                left = 0.0
                for column in range(0, d, BLOCK_D):
                    columns = column + tl.arange(0, BLOCK_D)
                    place = residual + row * d + columns
                    r = tl.load(place, mask=columns < d, other=0.0)
                    r -= v * tl.load(W + j * d + columns, mask=columns < d, other=0.0)
                    tl.store(place, r, mask=columns < d)
                    left += tl.sum(r * r, 0)
                left = tl.sqrt(left)
    tl.store(counts + row, count)
    tl.store(indices + row * k + lanes, found, mask=lanes < k)
    tl.store(values + row * k + lanes, amount, mask=lanes < k)


@torch.no_grad()
def matching_pursuit(
    x: Tensor,
    W: Tensor,
    k: int,
    *,
    signed: bool = False,
    distinct: bool = False,
    until_repeat: bool = False,
    tolerance: float | None = None,
    trail: Tensor | None = None,
    gram: Tensor | None = None,
) -> tuple[Pattern, Tensor]:
    """As :func:`unweave.kernels.pursuit.reference.matching_pursuit`, in float32, by the Gram matrix.

    Args:
        gram: ``(m, m)``, ``W W^T`` in float32 or bfloat16; worked out if None.

    Raises:
        UnweaveError: when shapes or types do not fit, or a number is not finite.
    """
    check(x, W, k, tolerance, trail)
    n, m = len(x), len(W)
    if x.dtype != torch.float32 or (gram is not None and gram.shape != (m, m)):
        found = x.dtype if gram is None else f"{x.dtype} and a Gram matrix {tuple(gram.shape)}"
        raise UnweaveError(f"pursuit on a GPU: expected float32 and a Gram matrix ({m}, {m}), found {found}")
    if n * min(k, m) == 0:
        return nothing(x, m)
    x, W = x.contiguous(), W.contiguous()
    gram = W @ W.T if gram is None else gram.contiguous()
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)
    values, counts = torch.empty(n, k, device=x.device), torch.empty(n, dtype=torch.long, device=x.device)
    blocks = {
        "WIDTH": power_of_two(k),
        "BLOCK": min(_BLOCK, power_of_two(m)),
        "BLOCK_D": min(512, power_of_two(x.shape[1])),
    }
    flags = {
        "SIGNED": signed,
        "DISTINCT": distinct,
        "UNTIL_REPEAT": until_repeat,
        "HAS_TRAIL": trail is not None,
        "HAS_TOLERANCE": tolerance is not None,
        "FLOOR": _FLOOR,
    }
    step = max(64, _ROOM // m)
    written = (x, indices, values, counts, indices if trail is None else trail)
    for part, *out in zip(*(tensor.split(step) for tensor in written)):
        residual = torch.empty_like(part) if tolerance is not None else part
        args = (part, W, part @ W.T, gram, residual, *out, float(tolerance or 0), x.shape[1], m, k)
        launch(_pursue, (len(part),), *args, **flags, **blocks, num_warps=8)
    return packed(indices, values, counts, m)
