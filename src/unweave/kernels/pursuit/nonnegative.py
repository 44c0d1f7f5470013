"""Nonnegative orthogonal matching pursuit, all rows side by side in plain PyTorch; on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.pattern import Pattern
from unweave.kernels.pursuit import check, dependence, noise, nothing, packed

_ROOM = 2**24  # numbers of (rows, k, d) atoms gathered at a time


@torch.no_grad()
def nonnegative_pursuit(x: Tensor, W: Tensor, k: int, *, tolerance: float | None = None) -> tuple[Pattern, Tensor]:
    """After each pick, nonnegative least squares on the atoms picked so far (Bruckstein, Elad, Zibulevsky 2008).

    An atom whose value falls to zero is let go, and may be picked again. This is the algorithm of Lawson and Hanson
    (1974) for nonnegative least squares on all atoms, stopped after ``k`` picks: every pick lowers the residual, and
    the residual is orthogonal to every atom that has a value.

    Args:
        x: ``(n, d)`` rows. W: ``(m, d)`` atoms. k: picks a row.
        tolerance: a row is done when its residual norm is not above this.

    Returns:
        The pattern, its entries in order of pick, and their values ``(nnz,)``, all above 0.

    Raises:
        UnweaveError: when shapes or types do not fit, or a number is not finite.
    """
    check(x, W, k, tolerance)
    n, m, width = len(x), len(W), min(k, len(W), x.shape[1])
    if n * width == 0:
        return nothing(x, m)
    step = max(64, _ROOM // max(m, width * x.shape[1]))
    parts = [_pursue(part, W, k, width, tolerance) for part in x.split(step)]
    indices, values, counts = (torch.cat(pieces) for pieces in zip(*parts))
    return packed(indices, values, counts, m)


def _pursue(x: Tensor, W: Tensor, k: int, width: int, tolerance: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(n, width)`` indices and values and ``(n,)`` counts; the entries of a row are its first ``counts``."""
    n, m = len(x), len(W)
    floor = noise(x.dtype) * x.norm(dim=1)
    indices = torch.zeros(n, width, dtype=torch.long, device=x.device)
    values, counts = x.new_zeros(n, width), torch.zeros(n, dtype=torch.long, device=x.device)
    passed = torch.zeros(n, m, dtype=torch.bool, device=x.device)  # no use to this residual
    residual, active = x.clone(), torch.ones(n, dtype=torch.bool, device=x.device)
    lanes = torch.arange(width, device=x.device)
    picks = torch.zeros(n, dtype=torch.long, device=x.device)
    while True:
        taken = passed.clone()
        held = lanes < counts[:, None]
        taken[held.nonzero()[:, 0], indices[held]] = True
        best, at = (residual @ W.T).masked_fill(taken, 0).max(dim=1)
        active &= (best > floor) & (counts < width) & (picks < k)
        if tolerance is not None:
            active &= residual.norm(dim=1) > tolerance
        row = active.nonzero().squeeze(1)
        if len(row) == 0:
            return indices, values, counts
        tried = indices[row].scatter(1, counts[row, None], at[row, None])
        fresh = _fresh(W[tried], counts[row])
        passed[row[~fresh], at[row[~fresh]]] = True  # in the span already: it could only trade places
        row, tried = row[fresh], tried[fresh]
        if len(row) == 0:
            continue
        kept, found = _least_squares(x[row], W[tried], values[row], counts[row] + 1)
        order = (~kept).int().argsort(dim=1, stable=True)  # what is left moves up
        indices[row] = tried.gather(1, order)
        values[row] = (found * kept).gather(1, order)
        counts[row] = kept.sum(1)
        residual[row] = x[row] - torch.einsum("nk,nkd->nd", values[row], W[indices[row]])
        picks[row] += 1
        passed[row] = False


def _fresh(atoms: Tensor, counts: Tensor) -> Tensor:
    """Whether the atom at place ``counts`` lies outside the span of those before it."""
    width = atoms.shape[1]
    lanes = torch.arange(width, device=atoms.device)
    new = atoms[torch.arange(len(atoms), device=atoms.device), counts]
    held = atoms * (lanes < counts[:, None])[:, :, None]
    gram = held @ held.mT + torch.diag_embed((lanes >= counts[:, None]).to(atoms.dtype))
    along = torch.linalg.solve(gram, (held @ new[:, :, None]))
    outside = new - (held * along).sum(1)
    return outside.square().sum(1) > dependence(atoms.dtype) * new.square().sum(1)


def _least_squares(x: Tensor, atoms: Tensor, start: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Nonnegative least squares on the first ``counts`` atoms of each row, from the values without the last of them.

    Solve for all that are kept; where a value is not positive, go only as far as the first of them reaches zero, let go
    of it, and solve again: the inner loop of Lawson and Hanson. At most one is let go a round and the newest stays, so
    it ends.
    """
    width = atoms.shape[1]
    kept = torch.arange(width, device=x.device) < counts[:, None]
    gram, target = atoms @ atoms.mT, (atoms @ x[:, :, None]).squeeze(2)
    now = start * kept
    for _ in range(width):
        both = kept[:, :, None] & kept[:, None, :]
        system = gram * both + torch.diag_embed((~kept).to(x.dtype))
        goal = torch.linalg.solve(system, (target * kept)[:, :, None]).squeeze(2)
        bad = kept & (goal <= 0)
        if not bool(bad.any()):
            return kept, goal
        share = torch.where(bad, now / (now - goal).clamp_min(torch.finfo(x.dtype).tiny), torch.inf)
        step, first = share.min(dim=1)
        short = step.isfinite()
        now = torch.where(short[:, None], now + step.where(short, 0)[:, None] * (goal - now), goal)
        dropped = torch.zeros_like(kept).scatter(1, first[:, None], short[:, None])
        kept = kept & ~dropped
        now = now.clamp_min(0) * kept
    return kept, goal
