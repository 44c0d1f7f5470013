"""Random directions: the negative control, whatever number one looks at."""

from __future__ import annotations

from torch import Tensor

from unweave.dictionaries.classical._base import ClassicalConfig, LinearClassical
from unweave.dictionaries.registry import register


@register("random")
class RandomDirections(LinearClassical):
    """``z = s A (x - mean)`` with random unit rows A, the k largest by magnitude: what width and k buy untrained.

    Only the mean and the one factor s are learnt, s by least squares: without it many atoms together overshoot.
    """

    Config = ClassicalConfig
    citation = "a control, of no paper"
    good_for = "the negative control: what width and k buy untrained"

    def learn(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        self.set_atoms(self.W_dec.clone(), self.W_dec.clone(), mean)
        some = rows[:4096]
        plain, centred = self.decode(self.encode(some)) - mean, some - mean
        self.W_enc.mul_((plain * centred).sum() / plain.square().sum().clamp_min(1e-30))
