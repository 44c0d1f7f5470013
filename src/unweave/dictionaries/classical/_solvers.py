"""Least squares codes under constraints, row by row: accelerated projected gradient with a fixed number of steps.

No stopping rule looks at other rows, so a row's code does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_GATHERED = 2**24  # numbers of atoms that are gathered at a time


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
    if not atoms.numel():
        return 0.0
    atoms = atoms.detach().double()
    smaller = atoms @ atoms.T if len(atoms) < atoms.shape[1] else atoms.T @ atoms  # the same eigenvalues, but for 0
    return float(torch.linalg.eigvalsh(smaller)[-1])


def _descend(
    x: Tensor, atoms: Tensor, steps: int, project: Callable[[Tensor], Tensor], z: Tensor, k: int | None
) -> Tensor:
    m, d = atoms.shape
    inner, rate = x @ atoms.T, 1 / max(curvature(atoms), 1e-30)
    gram = atoms @ atoms.T if m <= 2 * d else None  # with more atoms, going by way of the rows is less work

    def pulled(z: Tensor) -> Tensor:
        return z @ gram if gram is not None else z @ atoms @ atoms.T

    z = _fista(pulled, inner, rate, steps, project, z)
    if k is None or k >= m:
        return z
    chosen, rows = z.topk(k, dim=1).indices, max(1, _GATHERED // (k * d))
    parts = [
        _on_support(atoms[at], inner.gather(1, at), steps, project, z.gather(1, at))
        for inner, z, at in zip(inner.split(rows), z.split(rows), chosen.split(rows))
    ]
    return torch.zeros_like(z).scatter_(1, chosen, torch.cat(parts))


def _on_support(atoms: Tensor, inner: Tensor, steps: int, project: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Codes ``(n, k)`` for ``(n, k, d)`` atoms, a few for each row."""
    gram = atoms @ atoms.mT
    # No eigenvalue is above the largest sum of a Gram matrix's row, so each row may take steps of its own length.
    rate = 1 / gram.abs().sum(2).amax(1, keepdim=True).clamp_min(1e-30)
    return _fista(lambda z: (z[:, None] @ gram)[:, 0], inner, rate, steps, project, project(start))


def _fista(
    pulled: Callable[[Tensor], Tensor],
    inner: Tensor,
    rate: float | Tensor,
    steps: int,
    project: Callable[[Tensor], Tensor],
    z: Tensor,
) -> Tensor:
    """FISTA (Beck, Teboulle 2009); a row whose momentum points uphill begins anew (O'Donoghue, Candes 2015).

    ``pulled(z)`` is z times the Gram matrix.
    """
    ahead, momentum = z, z.new_ones(len(z), 1)
    for _ in range(steps):
        moved = project(ahead - rate * (pulled(ahead) - inner))
        uphill = ((ahead - moved) * (moved - z)).sum(1, keepdim=True) > 0
        faster = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        ahead = moved + torch.where(uphill, 0.0, (momentum - 1) / faster) * (moved - z)
        z, momentum = moved, faster
    return z
