"""Row-wise Adam on a GPU: each row is read and written once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from unweave.kernels._triton import check_contiguous, constexpr, jit, launch, power_of_two, tl
from unweave.kernels.adam.reference import AdamStep, Rows

_BLOCK = 1024


@jit
def step_block(
    w, g, first, second, at, inside, beta1, beta2, rest1, rest2, step_size, correction, eps,
):  # fmt: skip
    """Weights after one Adam step with gradient ``g``; the moments at ``at`` are read and written."""
    m = beta1 * tl.load(first + at, mask=inside, other=0.0) + rest1 * g
    v = beta2 * tl.load(second + at, mask=inside, other=0.0) + rest2 * g * g
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    return w - step_size * m / (tl.sqrt(v) * correction + eps)


@jit
def _adam_rows(
    G, clip, W, first, second, beta1, beta2, rest1, rest2, step_size, correction, eps, shadow, d,
    UNIT_NORM: constexpr, HAS_SHADOW: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """One program per feature. A row that is to have unit norm is read back from cache to be scaled."""
    feature = tl.program_id(0).to(tl.int64)
    norm = tl.zeros([BLOCK_D], tl.float32)
    for column in range(0, d, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside, at = columns < d, feature * d + columns
        g = clip * tl.load(G + at, mask=inside, other=0.0)
        w = tl.load(W + at, mask=inside, other=0.0)
        w = step_block(w, g, first, second, at, inside, beta1, beta2, rest1, rest2, step_size, correction, eps)
        norm += tl.where(inside, w * w, 0.0)
        tl.store(W + at, w, mask=inside)
        if HAS_SHADOW and not UNIT_NORM:
            tl.store(shadow + at, w.to(tl.bfloat16), mask=inside)
    if UNIT_NORM:
        scale = 1 / tl.maximum(tl.sqrt(tl.sum(norm, 0)), 1e-12)
        tl.debug_barrier()  # what this program's other threads stored is read next
        for column in range(0, d, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside, at = columns < d, feature * d + columns
            w = scale * tl.load(W + at, mask=inside, other=0.0)
            tl.store(W + at, w, mask=inside)
            if HAS_SHADOW:
                tl.store(shadow + at, w.to(tl.bfloat16), mask=inside)


@jit
def _project(W, G, d, BLOCK_D: constexpr):
    """One program per feature."""
    feature = tl.program_id(0).to(tl.int64)
    gw, ww = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for column in range(0, d, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside, at = columns < d, feature * d + columns
        w = tl.load(W + at, mask=inside, other=0.0)
        gw += w * tl.load(G + at, mask=inside, other=0.0)
        ww += w * w
    along = tl.sum(gw, 0) / tl.maximum(tl.sum(ww, 0), 1e-24)
    for column in range(0, d, BLOCK_D):
        columns = column + tl.arange(0, BLOCK_D)
        inside, at = columns < d, feature * d + columns
        g = tl.load(G + at, mask=inside, other=0.0) - along * tl.load(W + at, mask=inside, other=0.0)
        tl.store(G + at, g, mask=inside)


def adam_rows(rows: Rows, G: Tensor, step: AdamStep, clip: float = 1.0) -> None:
    """As :func:`unweave.kernels.adam.reference.adam_rows`, in float32."""
    d = G.shape[1]
    flags = {"UNIT_NORM": rows.unit_norm, "HAS_SHADOW": rows.shadow is not None, **row_blocks(d)}
    launch(_adam_rows, (len(G),), G.contiguous(), float(clip), *arguments(rows, step), d, **flags)


def project(rows: Rows, G: Tensor) -> Tensor:
    """As :func:`unweave.kernels.adam.reference.project`, in float32."""
    if rows.unit_norm:
        check_contiguous(rows.W, G)
        launch(_project, (len(G),), rows.W, G, G.shape[1], **row_blocks(G.shape[1]))
    return G


def row_blocks(d: int) -> dict[str, Any]:
    """Block size for going along one row of width ``d``."""
    return {"BLOCK_D": min(power_of_two(max(d, 16)), _BLOCK), "num_warps": 4}


def arguments(rows: Rows, step: AdamStep) -> tuple[Any, ...]:
    """What a kernel that steps rows needs of both: W, moments, five numbers, shadow (or W again)."""
    shadow = rows.W if rows.shadow is None else rows.shadow
    check_contiguous(rows.W, rows.first, rows.second, shadow)
    beta1, beta2 = step.betas  # their rests are taken here: in float32, 1 - 0.999 is off by 5e-5
    rates = beta1, beta2, 1 - beta1, 1 - beta2
    return (rows.W, rows.first, rows.second, *rates, step.step_size, step.correction, step.eps, shadow)
