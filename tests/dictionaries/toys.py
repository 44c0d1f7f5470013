"""Data whose true features are known, for the orderings that a method promises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
