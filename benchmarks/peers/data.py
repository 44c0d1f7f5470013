"""Synthetic activations with known atoms, made once and kept in memory.

A row is a sparse sum of unit atoms (8,192 of them, firing rates by Zipf's law, exponential amplitudes) plus Gaussian
noise and a constant offset, all scaled so that the mean squared norm is 1.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor


def synthetic_rows(
    n: int, d: int, *, n_atoms: int = 8192, active: float = 40.0, noise: float = 0.1, offset: float = 0.3, seed: int = 0
) -> Tensor:
    """``(n, d)`` float32 rows.

    Args:
        active: atoms that fire per row on average. noise, offset: norms as shares of the sparse part's.
    """
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((n_atoms, d), dtype=np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    rate = 1 / (np.arange(n_atoms) + 20.0)
    rate = np.minimum(active * rate / rate.sum(), 0.5)
    x = np.empty((n, d), np.float32)
    for first in range(0, n, 65_536):
        part = min(65_536, n - first)
        counts = rng.binomial(part, rate)
        columns = np.repeat(np.arange(n_atoms), counts)
        rows = rng.integers(0, part, len(columns))
        values = rng.exponential(1.0, len(columns)).astype(np.float32)
        x[first : first + part] = sp.csr_matrix((values, (rows, columns)), shape=(part, n_atoms)) @ atoms
    size = float(np.sqrt((x[:8192].astype("f8") ** 2).sum(1).mean()))
    direction = rng.standard_normal(d, dtype=np.float32)
    x += noise * size / np.sqrt(d) * rng.standard_normal((n, d), dtype=np.float32)
    x += offset * size * direction / np.linalg.norm(direction)
    x /= np.sqrt((x[:8192].astype("f8") ** 2).sum(1).mean())
    return torch.from_numpy(x)
