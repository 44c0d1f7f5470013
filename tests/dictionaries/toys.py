"""Data whose true features are known, for the orderings that a method promises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PARENTS = (0, 4, 8)  # of the tree; each has the three features behind it for children


def planted(seed: int, n: int = 10_000, m: int = 64, d: int = 32, k: int = 3) -> tuple[Tensor, Tensor]:
    """``(m, d)`` random unit atoms and ``(n, d)`` rows, each a sum of k atoms with weights from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    active = torch.rand(n, m, generator=generator).topk(k, 1).indices
    values = torch.rand(n, k, generator=generator) + 0.5
    return atoms, torch.zeros(n, m).scatter_(1, active, values) @ atoms


def graded(seed: int, n: int = 10_000, m: int = 128, d: int = 32, k: int = 8) -> Tensor:
    """``(n, d)`` rows of k atoms each whose weights differ by a factor of 20: what comes first matters."""
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    active = torch.rand(n, m, generator=generator).topk(k, 1).indices
    values = 2 * torch.rand(n, k, generator=generator).square() + 0.1
    return torch.zeros(n, m).scatter_(1, active, values) @ atoms


def tree(seed: int, n: int = 20_000) -> tuple[Tensor, Tensor]:
    """``(20, 20)`` unit atoms of two levels and ``(n, 20)`` rows (Costa et al. 2025).

    A row has one of three parents (a fifth each) or of eight features without children; a parent comes with one of
    its three children (a fifth each) or alone. Features of a level have cosine 0.1; a child is orthogonal to its
    parent.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator))[0].T
    top = [*PARENTS, *range(12, 20)]
    atoms = basis.clone()
    for level, share in [(top, 0.3), *(([p + 1, p + 2, p + 3], 0.0895) for p in PARENTS)]:
        for i in level:
            others = [j for j in level if j != i]
            atoms[i] = F.normalize((1 - share) * basis[i] + share / len(others) * basis[others].sum(0), dim=0)
    first = torch.multinomial(torch.tensor([0.2] * 3 + [0.05] * 8), n, replacement=True, generator=generator)
    child = torch.multinomial(torch.tensor([0.2, 0.2, 0.2, 0.4]), n, replacement=True, generator=generator)
    amplitude = 1.5 + 0.25 * torch.randn(2, n, generator=generator)
    z, row, feature = torch.zeros(n, 20), torch.arange(n), torch.tensor(top)[first]
    z[row, feature] = amplitude[0]
    has = (first < 3) & (child < 3)
    z[row[has], feature[has] + 1 + child[has]] = amplitude[1][has]
    return atoms, z @ atoms


def parent_child_cosine(atoms: Tensor, found: Tensor) -> float:
    """The mean cosine of a learnt parent with its learnt children, after matching one to one; 0 in truth."""
    from scipy.optimize import linear_sum_assignment

    found = F.normalize(found, dim=1)
    _, match = linear_sum_assignment(-(atoms @ found.T).numpy())
    learnt = found[torch.as_tensor(match)]
    return sum(float(learnt[p] @ learnt[p + i]) for p in PARENTS for i in (1, 2, 3)) / 9
