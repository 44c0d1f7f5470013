"""The annealed penalty ``lambda_t ||z||_p^p``: from L1 towards L0, one small step of p at a time."""

from __future__ import annotations

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from unweave.dictionaries._base import DictionaryConfig, Loss, warm
from unweave.dictionaries._linear import LinearDictionary

# Below this the power goes over into a straight line: the slope of z^p at 0 has no limit, and one code that is almost
# zero would outweigh a whole batch. Far below the values of codes for inputs of E||x||^2 = 1.
_SMALL = 1e-3
_RECENT = 10  # steps over which both powers are averaged when p changes


class AnnealConfig(DictionaryConfig):
    """
    Attributes:
        sparsity_coefficient: lambda.
        sparsity_warmup: share of training over which the penalty rises from 0.
        p_end: the power that p falls to, from 1; 1 leaves it where it is.
        p_steps: changes of p on the way.
        anneal_start: share of training after which p begins to fall. The rest is divided evenly among the changes, and
            the last p has its share too.
    """

    sparsity_coefficient: PositiveFloat
    sparsity_warmup: float = Field(0.05, ge=0, le=1)
    p_end: float = Field(0.2, gt=0, le=1)
    p_steps: PositiveInt = 10
    anneal_start: float = Field(0.1, ge=0, lt=1)


class Annealed(LinearDictionary):
    """What an architecture with this penalty keeps: how far p has come, and what lambda has been multiplied with.

    At every change of p, lambda is multiplied by the mean of ``||z||_p^p`` with the old p over that with the new one,
    over the last ten steps: the penalty goes on from where it was, and the gradient only turns towards small codes.
    """

    p_stage: Tensor
    penalty_scale: Tensor
    recent_powers: Tensor

    def __init__(self, config: AnnealConfig) -> None:
        super().__init__(config)  # pyright: ignore[reportArgumentType]
        self.register_buffer("p_stage", torch.tensor(0))
        self.register_buffer("penalty_scale", torch.tensor(1.0))
        self.register_buffer("recent_powers", torch.zeros(_RECENT, 2))

    def power(self, stage: int) -> float:
        """p after so many changes."""
        return 1 + (self.config.p_end - 1) * min(stage, self.config.p_steps) / self.config.p_steps

    def coefficient(self, progress: float) -> float:
        """lambda_t: what ``||z||_p^p`` is multiplied with."""
        config = self.config
        return config.sparsity_coefficient * warm(progress, config.sparsity_warmup) * float(self.penalty_scale)

    def powers(self, values: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """``||z||_p^p`` averaged over n rows, its slopes by the values, and the same norm with the next p.

        Args:
            values: ``(nnz,)``, none of them negative.
        """
        stage = int(self.p_stage)
        now, following = self.power(stage), self.power(stage + 1)
        slopes = now * values.clamp_min(_SMALL).pow(now - 1) / max(1, n)
        return _power(values, now) / max(1, n), slopes, _power(values, following) / max(1, n)

    def observe(self, loss: Loss, progress: float) -> None:
        super().observe(loss, progress)
        pair = torch.stack([loss.terms["lp"], loss.terms["lp_next"]]).to(self.recent_powers)
        self.recent_powers.copy_(torch.cat([self.recent_powers[1:], pair[None]]))
        config = self.config
        begun = (progress - config.anneal_start) / (1 - config.anneal_start)
        due = min(config.p_steps, int(begun * config.p_steps) + 1) if begun >= 0 and config.p_end < 1 else 0
        if int(self.p_stage) < due:
            old, new = self.recent_powers.sum(0)
            if float(old) > 0 and float(new) > 0:
                self.penalty_scale.mul_(old / new)
            self.p_stage.add_(1)
            self.recent_powers.zero_()  # they are of other powers than those of the stage that begins


def _power(values: Tensor, p: float) -> Tensor:
    if p == 1:
        return values.sum()
    line = p * _SMALL ** (p - 1)
    curve = values.clamp_min(_SMALL).pow(p) - _SMALL**p + line * _SMALL
    return torch.where(values > _SMALL, curve, line * values).sum()
