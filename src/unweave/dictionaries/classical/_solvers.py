"""Least squares codes under constraints, row by row: accelerated projected gradient with a fixed number of steps.

No stopping rule looks at other rows, so a row's code does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def nonnegative_codes(x: Tensor, atoms: Tensor, steps: int, k: int | None = None) -> Tensor:
    """``argmin ||x - z atoms||^2`` over z >= 0, for ``(n, d)`` rows and ``(m, d)`` atoms.

    With ``k``, once more over the k largest entries of each row's z alone.
    """
    return _descend(x, atoms, steps, F.relu, x.new_zeros(len(x), len(atoms)), k)


def simplex_codes(x: Tensor, atoms: Tensor, steps: int, k: int | None = None, start: Tensor | None = None) -> Tensor:
    """``argmin ||x - z atoms||^2`` over z >= 0 with ``sum z = 1``: the nearest point of the atoms' convex hull.

    With ``k``, once more over the hull of the k atoms of largest share.
    """
    if start is None:
        start = x.new_full((len(x), len(atoms)), 1 / max(1, len(atoms)))
    return _descend(x, atoms, steps, onto_simplex, start, k)


def onto_simplex(z: Tensor) -> Tensor:
    """The nearest point with entries of 0 or more that add up to 1, of each row (Held, Wolfe, Crowder 1974)."""
    sorted_ = z.sort(dim=1, descending=True).values
    excess = (sorted_.cumsum(1) - 1) / torch.arange(1, z.shape[1] + 1, device=z.device, dtype=z.dtype)
    support = (sorted_ > excess).sum(1, keepdim=True)
    return F.relu(z - excess.gather(1, support - 1))


def curvature(atoms: Tensor) -> float:
    """The largest eigenvalue of the atoms' Gram matrix."""
    return float(torch.linalg.matrix_norm(atoms.detach().double(), 2).square()) if atoms.numel() else 0.0


def _descend(
    x: Tensor, atoms: Tensor, steps: int, project: Callable[[Tensor], Tensor], z: Tensor, k: int | None
) -> Tensor:
    gram, inner = atoms @ atoms.T, x @ atoms.T
    rate = 1 / max(curvature(atoms), 1e-30)
    z = _fista(gram, inner, rate, steps, project, z)
    if k is None or k >= len(atoms):
        return z
    left_out = torch.ones_like(z, dtype=torch.bool).scatter_(1, z.topk(k, dim=1).indices, False)
    inside = partial(_project_inside, project, left_out)
    return _fista(gram, inner, rate, steps, inside, inside(z))


def _project_inside(project: Callable[[Tensor], Tensor], left_out: Tensor, z: Tensor) -> Tensor:
    return project(z.masked_fill(left_out, -torch.inf))


def _fista(
    gram: Tensor, inner: Tensor, rate: float, steps: int, project: Callable[[Tensor], Tensor], z: Tensor
) -> Tensor:
    """FISTA (Beck, Teboulle 2009); a row whose momentum points uphill begins anew (O'Donoghue, Candes 2015)."""
    ahead, momentum = z, z.new_ones(len(z), 1)
    for _ in range(steps):
        moved = project(ahead - rate * (ahead @ gram - inner))
        uphill = ((ahead - moved) * (moved - z)).sum(1, keepdim=True) > 0
        faster = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = moved + torch.where(uphill, 0.0, (momentum - 1) / faster) * (moved - z)
        z, momentum = moved, faster
    return z
