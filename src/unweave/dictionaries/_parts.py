"""Rows that are several activations side by side: the layers of a model, or two models on the same tokens."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from unweave.dictionaries._base import Dictionary, TrainingBatch
from unweave.dictionaries._linear import LinearConfig
from unweave.errors import UnweaveError


class PartsConfig(LinearConfig):
    """
    Attributes:
        n_parts: how many activations of equal width make up a row; ``d_in`` and ``d_out`` are multiples of it.
    """

    subtract_bias: Literal[False] = False  # input and output parts have scales of their own
    n_parts: PositiveInt = 2

    @model_validator(mode="after")
    def _parts_fit(self) -> PartsConfig:
        for name in ("d_in", "d_out"):
            if getattr(self, name) % self.n_parts:
                raise ValueError(f"n_parts = {self.n_parts} does not divide {name} = {getattr(self, name)}")
        return self


class Parts(Dictionary):
    """A mixin, first among the bases: every part of a row counts equally, whatever its norm.

    Sites differ in norm by factors of ten and more, and in a common loss the long ones would be all that matters. So
    the weights see parts scaled to ``E||x^l||^2 = 1``, each by a factor measured in :meth:`initialise`, while what
    goes in and comes out is in the units of the data. :meth:`complete` moves the factors into the weights: the same
    function, for raw rows.

    Attributes:
        in_scales, out_scales: ``(n_parts,)``, the factors; 1 where the weights hold them already.
        part_rms: ``(n_parts,)``, root mean square norm of each part of the target, in the units of the output.
    """

    in_scales: Tensor
    out_scales: Tensor
    part_rms: Tensor

    def __init__(self, config: PartsConfig) -> None:
        super().__init__(config)
        for name in ("in_scales", "out_scales", "part_rms"):
            self.register_buffer(name, torch.ones(config.n_parts))

    @property
    def n_parts(self) -> int:
        return self.config.n_parts

    def split(self, rows: Tensor) -> Tensor:
        """``(n, n_parts * d)`` as ``(n, n_parts, d)``."""
        return rows.unflatten(1, (self.n_parts, -1))

    def scaled_input(self, x: Tensor) -> Tensor:
        """Input rows as the weights see them."""
        return x * self.in_scales.repeat_interleave(self.d_in // self.n_parts)

    def scaled_target(self, y: Tensor) -> Tensor:
        """Target rows, or errors, as the weights see them."""
        return y * self.out_scales.repeat_interleave(self.d_out // self.n_parts)

    def unscaled(self, y: Tensor) -> Tensor:
        """What the weights put out, in the units of the target."""
        return y / self.out_scales.repeat_interleave(self.d_out // self.n_parts)

    def residual(self, batch: TrainingBatch, reconstruction: Tensor) -> Tensor:
        """``(n, d_out)``, target minus reconstruction with all parts at one scale: what a loss squares."""
        return self.scaled_target(batch.target - reconstruction)

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        self.in_scales.copy_(1 / self._rms(sample, "input"))
        self.part_rms.copy_(self._rms(target, "target"))
        self.out_scales.copy_(1 / self.part_rms)
        super().initialise(sample, self.scaled_target(target))

    def _rms(self, rows: Tensor, what: str) -> Tensor:
        rms = self.split(rows).double().square().sum(2).mean(0).sqrt()
        if bool((rms == 0).any()):
            raise UnweaveError(
                f"{self.name}: part {int((rms == 0).nonzero()[0])} of the {what} rows is zero in every row: leave that "
                "site out, or see whether the parts were joined in the right order"
            )
        return rms.to(self.part_rms)

    def fold_parts(self, into: Tensor, out_of: Tensor) -> None:
        """Multiply the weights that read part l by ``into[l]``, and divide those that write part l by ``out_of[l]``."""
        raise NotImplementedError

    @torch.no_grad()
    def complete(self) -> None:
        super().complete()
        self.fold_parts(self.in_scales, self.out_scales)
        self.in_scales.fill_(1.0)
        self.out_scales.fill_(1.0)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        Parts.complete(self)  # one global factor fits weights that hold the others
        super().fold_scale(scale, out_scale)
        self.part_rms.div_(scale if out_scale is None else out_scale)
