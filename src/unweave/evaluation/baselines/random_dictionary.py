"""A dictionary of random directions: what sparsity and width buy without any training."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.decode.reference import decode
from unweave.kernels.select.reference import select_topk


class RandomDictionary:
    """``mean + s * sum of <x - mean, a> a`` over the ``l0`` random unit directions ``a`` with the largest products.

    The one number ``s`` is the least-squares optimum on the fitted rows (correlated directions overshoot otherwise).

    Args:
        rows: ``(n, d)`` to fit mean and scale on. l0: directions a row. n_features: directions in all.
        seed: of the directions.
    """

    def __init__(self, rows: Tensor, *, l0: int, n_features: int, seed: int = 0) -> None:
        d = rows.shape[1]
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n_features, d, generator=generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.l0 = min(l0, n_features)
        self.mean = rows.mean(0, dtype=torch.float64)
        self.scale = 1.0
        centred = rows[:4096].float() - self.mean.to(rows.device, torch.float32)
        plain = torch.cat([self._sum(part) for part in centred.split(256)])
        self.scale = float((plain * centred).sum() / plain.square().sum().clamp_min(1e-30))

    def __call__(self, rows: Tensor) -> Tensor:
        mean = self.mean.to(rows)
        return mean + self.scale * self._sum(rows - mean)

    def _sum(self, centred: Tensor) -> Tensor:
        if self.directions.device != centred.device:
            self.directions = self.directions.to(centred.device)
        directions = self.directions.to(centred.dtype)
        scores = centred @ directions.T
        pattern = select_topk(scores.abs(), self.l0)
        return decode(pattern, scores[pattern.rows, pattern.indices.long()], directions)
