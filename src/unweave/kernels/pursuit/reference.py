"""Matching pursuit and its siblings, with the residual written out: the truth for the compiled kernels.

Every pick costs a full product of residuals and atoms. Works in float32 and float64, on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.kernels.pattern import Pattern
from unweave.kernels.pursuit import check, dependence, noise, nothing, packed
from unweave.kernels.pursuit.nonnegative import nonnegative_pursuit as nonnegative_pursuit


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
) -> tuple[Pattern, Tensor]:
    """Matching pursuit (Mallat and Zhang 1993): ``k`` times the atom that correlates most with the residual.

    A pick's value is its correlation, and value times atom is taken off the residual. A row is done early when no
    correlation is positive (see :func:`unweave.kernels.pursuit.noise`).

    Args:
        x: ``(n, d)`` rows. W: ``(m, d)`` atoms of norm 1. (Other norms are not put right; the residual does not shrink
            as it should, and grows where a norm exceeds the square root of 2.)
        k: picks a row. An atom may be picked again; its values add up, so a row has at most k entries.
        signed: pick by absolute correlation, with values of either sign.
        distinct: never pick an atom again.
        until_repeat: a row is done after its first pick of an atom that it had picked before.
        tolerance: a row is done when its residual norm is not above this.
        trail: ``(n, k)`` int32 to write into: the atom of every pick, repeats and all, and -1 after the last.

    Returns:
        The pattern, entries in order of first pick, and their values ``(nnz,)``.

    Raises:
        UnweaveError: when shapes or types do not fit, or a number is not finite.
    """
    check(x, W, k, tolerance, trail)
    n, m, width = len(x), len(W), min(k, len(W))
    if n * width == 0:
        return nothing(x, m)
    residual, floor = x.clone(), noise(x.dtype) * x.norm(dim=1)
    indices, values = _empty(x, width)
    counts = torch.zeros(n, dtype=torch.long, device=x.device)
    active = torch.ones(n, dtype=torch.bool, device=x.device)
    every = torch.arange(n, device=x.device)
    taken = torch.zeros(n, m, dtype=torch.bool, device=x.device) if distinct else None
    for t in range(k):
        scores = residual @ W.T
        strength = scores.abs() if signed else scores
        if taken is not None:
            strength = strength.masked_fill(taken, 0)
        best, at = strength.max(dim=1)
        active &= best > floor
        if tolerance is not None:
            active &= residual.norm(dim=1) > tolerance
        row = active.nonzero().squeeze(1)
        if len(row) == 0:
            break
        atom, value = at[row], scores[every, at][row]
        residual[row] -= value[:, None] * W[atom]
        again = indices[row] == atom[:, None]
        slot = torch.where(again.any(dim=1), again.int().argmax(dim=1), counts[row])
        indices[row, slot] = atom
        values[row, slot] += value
        counts[row] = torch.maximum(counts[row], slot + 1)
        if trail is not None:
            trail[row, t] = atom.int()
        if until_repeat:
            active[row] = ~again.any(dim=1)
        if taken is not None:
            taken[row, atom] = True
    return packed(indices, values, counts, m)


@torch.no_grad()
def orthogonal_matching_pursuit(
    x: Tensor, W: Tensor, k: int, *, signed: bool = False, tolerance: float | None = None
) -> tuple[Pattern, Tensor]:
    """Orthogonal matching pursuit (Pati et al. 1993): after each pick, least squares on all atoms picked so far.

    As :func:`matching_pursuit`, but for this: the residual is what the span of the picked atoms leaves of the row, the
    values are the least squares ones (of either sign, also where picking is not ``signed``), and no atom is picked
    twice. An atom that lies in the span already (see :func:`unweave.kernels.pursuit.dependence`) is passed over.
    """
    check(x, W, k, tolerance)
    n, m, width = len(x), len(W), min(k, len(W))
    if n * width == 0:
        return nothing(x, m)
    residual, floor = x.clone(), noise(x.dtype) * x.norm(dim=1)
    indices, _ = _empty(x, width)
    basis = x.new_zeros(n, width, x.shape[1])  # orthonormal, of the span
    counts = torch.zeros(n, dtype=torch.long, device=x.device)
    active = torch.ones(n, dtype=torch.bool, device=x.device)
    passed = torch.zeros(n, m, dtype=torch.bool, device=x.device)
    while True:
        scores = residual @ W.T
        best, at = (scores.abs() if signed else scores).masked_fill(passed, 0).max(dim=1)
        active &= (best > floor) & (counts < width)
        if tolerance is not None:
            active &= residual.norm(dim=1) > tolerance
        row = active.nonzero().squeeze(1)
        if len(row) == 0:
            break
        atom = at[row]
        passed[row, atom] = True
        new, known = W[atom], basis[row]
        for _ in range(2):  # a second time takes off what rounding left of the first
            new = new - torch.einsum("nkd,nk->nd", known, torch.einsum("nkd,nd->nk", known, new))
        outside = new.square().sum(dim=1)
        fresh = outside > dependence(x.dtype) * W[atom].square().sum(dim=1)
        row, atom, new = row[fresh], atom[fresh], new[fresh] / outside[fresh].sqrt()[:, None]
        residual[row] -= (residual[row] * new).sum(dim=1, keepdim=True) * new
        basis[row, counts[row]] = new
        indices[row, counts[row]] = atom
        counts[row] += 1
    kept = torch.arange(width, device=x.device) < counts[:, None]
    atoms = W[indices.clamp_min(0)] * kept[:, :, None]
    # In the basis the atoms are an upper triangle; rows that stopped early get ones on the rest of the diagonal.
    triangle = (basis @ atoms.mT).triu() + torch.diag_embed((~kept).to(x.dtype))
    values = torch.linalg.solve_triangular(triangle, basis @ x[:, :, None], upper=True).squeeze(2)
    return packed(indices, values, counts, m)


@torch.no_grad()
def gradient_pursuit(
    x: Tensor, W: Tensor, k: int, *, signed: bool = False, tolerance: float | None = None
) -> tuple[Pattern, Tensor]:
    """Gradient pursuit (Blumensath and Davies 2008): after each pick, one step of all picked atoms down the gradient.

    As :func:`matching_pursuit`, but for this: with r the residual and g its correlations with the picked atoms, values
    become ``w + a g``, where ``a = <g W, r> / ||g W||^2`` leaves the least residual; then, where picking is not
    ``signed``, values below 0 become 0 (Smith 2024 for sparse autoencoders). W may have atoms of any norm. The best
    atom may be one that was picked before: then the row only takes the step.
    """
    check(x, W, k, tolerance)
    n, m, width = len(x), len(W), min(k, len(W))
    if n * width == 0:
        return nothing(x, m)
    residual, floor = x.clone(), noise(x.dtype) * x.norm(dim=1)
    indices, values = _empty(x, width)
    counts = torch.zeros(n, dtype=torch.long, device=x.device)
    active = torch.ones(n, dtype=torch.bool, device=x.device)
    for _ in range(k):
        scores = residual @ W.T
        best, at = (scores.abs() if signed else scores).max(dim=1)
        active &= best > floor
        if tolerance is not None:
            active &= residual.norm(dim=1) > tolerance
        row = active.nonzero().squeeze(1)
        if len(row) == 0:
            break
        fresh = row[(indices[row] != at[row, None]).all(dim=1)]
        indices[fresh, counts[fresh]] = at[fresh]
        counts[fresh] += 1
        picked = indices[row].clamp_min(0)
        gradient = scores[row].gather(1, picked) * (indices[row] >= 0)
        direction = F.embedding_bag(picked, W, mode="sum", per_sample_weights=gradient)
        step = (direction * residual[row]).sum(dim=1) / direction.square().sum(dim=1)
        moved = values[row] + step[:, None] * gradient
        values[row] = moved if signed else moved.clamp_min(0)
        residual[row] = x[row] - F.embedding_bag(picked, W, mode="sum", per_sample_weights=values[row])
    return packed(indices, values, counts, m)


def _empty(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """``(n, width)`` indices that match no atom, and values of zero."""
    return torch.full((len(x), width), -1, device=x.device), x.new_zeros(len(x), width)
