"""The toy of MP-SAE: a two-level tree in which parents are orthogonal to their children, and levels within are not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PARENTS = (0, 4, 8)  # each with the next three as children
TOP = (*PARENTS, *range(12, 20))
#: How much of the others is mixed into a direction, for cosines of 0, 0.1, ..., 0.8 within a level.
CHILDREN_MIX = (0, 0.0895, 0.163, 0.226, 0.282, 0.3335, 0.3825, 0.431, 0.482)
TOP_MIX = (0, 0.3, 0.44, 0.529, 0.594, 0.6467, 0.692, 0.733, 0.7739)


def directions(level: int, generator: torch.Generator) -> Tensor:
    """``(20, 20)`` unit rows with cosines of ``level / 10`` within the top level and among siblings."""
    q = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
    out = q.clone()
    out[list(TOP)] = _mixed(q[list(TOP)], TOP_MIX[level])
    for parent in PARENTS:
        out[parent + 1 : parent + 4] = _mixed(q[parent + 1 : parent + 4], CHILDREN_MIX[level])
    return out


def _mixed(q: Tensor, share: float) -> Tensor:
    return F.normalize((1 - share) * q + share / (len(q) - 1) * (q.sum(0) - q), dim=1)


def rows(n: int, atoms: Tensor, generator: torch.Generator) -> Tensor:
    """``(n, 20)``: one top feature a row, and with a parent one of its children three times in five. E[L0] = 1.36."""
    chances = torch.tensor([0.2] * 3 + [0.05] * 8)
    top = torch.tensor(TOP)[torch.multinomial(chances, n, True, generator=generator)]
    child = torch.multinomial(torch.tensor([0.4, 0.2, 0.2, 0.2]), n, True, generator=generator)
    sizes = 1.5 + 0.25 * torch.randn(n, 2, generator=generator)
    z = torch.zeros(n, 20)
    z[torch.arange(n), top] = sizes[:, 0]
    row = ((top < 12) & (child > 0)).nonzero().squeeze(1)
    z[row, top[row] + child[row]] = sizes[row, 1]
    return z @ atoms


def measures(found: Tensor, atoms: Tensor) -> tuple[float, float]:
    """MMCS, and the mean cosine between what was matched to parents and to their children (0 in truth)."""
    from scipy.optimize import linear_sum_assignment

    found = F.normalize(found, dim=1)
    cosines = atoms @ found.T
    learned = found[linear_sum_assignment(-cosines.numpy())[1]]
    across = [learned[p] @ learned[p + i] for p in PARENTS for i in (1, 2, 3)]
    return float(cosines.max(1).values.mean()), float(torch.stack(across).mean())
