"""MP-SAE: the encoder is matching pursuit on the decoder's own atoms."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._pursuit import MatchingDictionary, PursuitConfig, chain, pursuit_ops, used
from unweave.dictionaries.registry import register
from unweave.kernels.pattern import Pattern

_FEW_DEAD = 10  # the revival term leaves up to so many alone


class MPConfig(PursuitConfig):
    """
    Attributes:
        variant: "fixed" makes k picks, an atom picked again adds up, and atoms keep unit norm (the overcomplete
            library's); "adaptive" also ends a row at the first atom that it picks again, and at ``tolerance``, with k
            as the most picks, and leaves the norms free: they stay near 1 by themselves (the authors' synthetic
            experiments; use ``k = d`` for their cap).
        tolerance: the residual norm at which a row is done, for inputs scaled to E||x||^2 = 1; None for no such end.
            When left out, 0.03 for "adaptive" (the authors' 0.05 on rows of a root mean square norm of 1.8) and none
            for "fixed".
        subtract_bias: encode ``x - b_dec`` and add ``b_dec`` back. Neither reference has a bias; with one, no atom is
            spent on the mean.
        revival_coefficient: of the term that pulls dead atoms to what is left over; 0.01 in the reference.
        atom_dropout: the share of atoms that each training batch does without.
    """

    variant: Literal["fixed", "adaptive"] = "fixed"
    tolerance: NonNegativeFloat | Literal["default"] | None = "default"
    subtract_bias: bool = False
    revival_coefficient: float = Field(0.01, ge=0)
    atom_dropout: float = Field(0.0, ge=0, lt=1)

    @property
    def start_tolerance(self) -> float | None:
        if self.tolerance == "default":
            return 0.03 if self.variant == "adaptive" else None
        return self.tolerance


@register("mp")
class MP(MatchingDictionary):
    """``r = x``; k times: ``j = argmax <r, d_j>``, ``c = <r, d_j>``, ``z_j += c``, ``r -= c d_j``; loss ``||r||^2``.

    Gradients run through every ``c`` and the whole chain of residuals; which atom is picked is not differentiated. A
    feature that is conditionally orthogonal to another (a child to its parent) is found in the residual that the other
    one leaves, where a linear encoder has to mix the two.

    The revival term is ``-coefficient <mean residual, mean dead atom>``, which equals the reference's mean over rows
    and dead atoms of their products. Two things differ: the trainer says which atoms are dead (no pick for many
    batches, rather than a small code in this batch), and the residual gets no gradient from it (the reference's lets
    the living atoms leave more over).
    """

    Config = MPConfig
    citation = "Costa, Fel, Lubana, Tolooshams, Ba 2025, From flat to hierarchical: MP-SAE, NeurIPS, arXiv:2506.03093"
    good_for = "features that are orthogonal only given others (children to parents), which one linear encoder mixes"
    betas = (0.5, 0.9375)  # the authors'; with Adam's own, atoms are still slightly off after five times as many steps

    def __init__(self, config: MPConfig) -> None:
        super().__init__(config, bias=config.subtract_bias, tolerance=config.start_tolerance)

    @property
    def unit_norm(self) -> bool:
        return self.config.variant == "fixed"

    def match(self, rows: Tensor, trail: Tensor | None = None) -> tuple[Pattern, Tensor]:
        return self._match(rows, self.W_dec.detach(), trail)

    def _match(self, rows: Tensor, W: Tensor, trail: Tensor | None) -> tuple[Pattern, Tensor]:
        rows, repeat = rows.detach(), self.config.variant == "adaptive"
        return pursuit_ops(W).matching_pursuit(
            rows, W, self.config.k, until_repeat=repeat, tolerance=self.stop_at(), trail=trail
        )

    def loss(self, batch: TrainingBatch) -> Loss:
        rows = self.centre(self.check_input(batch.input))
        trail, W = self.new_trail(rows), self.W_dec.detach()
        if self.training and self.config.atom_dropout:
            W = W * (torch.rand(len(W), 1, device=W.device) >= self.config.atom_dropout)  # zeros are never picked
        pattern, values = self._match(rows, W, trail)
        _, residual = chain(rows, self.W_dec, used(trail))
        mse = residual.square().sum(1).mean()
        revival = self._revival(residual.detach(), batch.dead)
        terms = {"mse": mse.detach(), "revival": revival.detach()}
        return Loss(mse + revival, terms, SparseCode.from_pattern(pattern, values), (batch.input - residual).detach())

    def _revival(self, residual: Tensor, dead: Tensor | None) -> Tensor:
        coefficient = self.config.revival_coefficient
        if dead is None or not coefficient or int(dead.sum()) <= _FEW_DEAD:
            return residual.new_zeros(())
        return -coefficient * (self.W_dec[dead].mean(0) @ residual.mean(0))
