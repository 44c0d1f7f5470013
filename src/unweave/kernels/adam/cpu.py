"""Row-wise Adam on a CPU: each row is read and written once."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from unweave.kernels._jit import array, dot, inline, jit, run, write_row
from unweave.kernels.adam.reference import AdamStep, Rows


@inline
def step_row(w, g, first, second, clip, beta1, beta2, step_size, correction, eps, unit_norm, shadow):
    """One Adam step of one row; ``shadow`` may be empty.

    The betas are float64: 1 - 0.999 in float32 is wrong by 5e-5 of itself, and the first steps' sizes by half of that.
    """
    one = np.float32(1)
    keep1, add1, keep2, add2 = np.float32(beta1), np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2)
    for j in range(len(w)):
        gradient = clip * g[j]
        m = keep1 * first[j] + add1 * gradient
        v = keep2 * second[j] + add2 * gradient * gradient
        first[j], second[j] = m, v
        w[j] -= step_size * m / (np.sqrt(v) * correction + eps)
    if unit_norm:
        scale = one / max(np.sqrt(dot(w, w)), np.float32(1e-12))
        for j in range(len(w)):
            w[j] *= scale
    if len(shadow) > 0:
        write_row(shadow, w)


@inline
def project_row(w, g, unit_norm):
    """Take from ``g`` its part along ``w``."""
    if unit_norm:
        along = dot(g, w) / max(dot(w, w), np.float32(1e-24))
        for j in range(len(w)):
            g[j] -= along * w[j]


@jit
def _adam_rows(lo, hi, G, clip, W, first, second, beta1, beta2, step_size, correction, eps, unit_norm, shadow):
    has_shadow, nothing = len(shadow) > 0, np.empty(0, np.int16)
    for f in range(lo, hi):
        copy = shadow[f] if has_shadow else nothing
        step_row(W[f], G[f], first[f], second[f], clip, beta1, beta2, step_size, correction, eps, unit_norm, copy)


@jit
def _project(lo, hi, W, G, squares, unit_norm):
    for f in range(lo, hi):
        project_row(W[f], G[f], unit_norm)
        squares[f] = dot(G[f], G[f])


def adam_rows(rows: Rows, G: Tensor, step: AdamStep, clip: float = 1.0) -> None:
    """As :func:`unweave.kernels.adam.reference.adam_rows`, in float32."""
    run(_adam_rows, len(G), array(G), np.float32(clip), *arguments(rows, step), work=8 * G.shape[1])


def project(rows: Rows, G: Tensor) -> Tensor:
    """As :func:`unweave.kernels.adam.reference.project`, in float32."""
    run(_project, len(G), array(rows.W), array(G), np.empty(len(G), np.float32), rows.unit_norm, work=4 * G.shape[1])
    return G


def arguments(rows: Rows, step: AdamStep) -> tuple[object, ...]:
    """What :func:`step_row` needs of both, in its order."""
    shadow = np.empty((0, 0), np.int16) if rows.shadow is None else array(rows.shadow)
    betas, numbers = map(float, step.betas), map(np.float32, (step.step_size, step.correction, step.eps))
    return (array(rows.W), array(rows.first), array(rows.second), *betas, *numbers, rows.unit_norm, shadow)
