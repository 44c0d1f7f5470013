"""g-SAE: TopK that selects by what a feature does to the model's loss, not by its size alone."""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch, no_side
from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.errors import UnweaveError
from unweave.kernels.autograd import sparse_encode


class GSAEConfig(TopKConfig):
    """
    Attributes:
        beta: how much the gradient counts in the selection; 0 is TopK. It has no unit: gradients are divided by their
            mean norm. About 1 trades a little reconstruction for less loss downstream; 10 and more is too much.
    """

    beta: float = Field(1.0, ge=0, allow_inf_nan=False)


@register("g_sae")
class GSAE(TopK):
    """``z = ReLU(u)`` at the k largest of ``s = u + beta ReLU(u) |W_dec g|``, g the gradient of the model's loss.

    ``u_i <d_i, g>`` is, to first order, what the loss changes by when feature i is deleted: at equal size, features
    that the model uses are preferred. Values and gradients of the dictionary know nothing of g: s only selects. The
    loss is that of TopK with AuxK.

    The side input of a row is g ``(n, d_out)``, by the activation that is reconstructed. It is divided by its mean norm
    over the first rows (kept in ``gradient_norm``); a gradient of 0 leaves TopK's choice. In eval mode ``encode(x)``
    selects as TopK does, for a new text has no loss yet: so do evaluation, index and browser. ``encode(x, side)``
    selects by the gradient.

    The formula is known from a summary of the paper alone: beta's value and scale, the gate in eval mode and the other
    settings are our choice.
    """

    Config = GSAEConfig
    citation = (
        "Olmo et al. 2025, Features that make a difference: leveraging gradients for improved dictionary learning, "
        "NAACL Findings, arXiv:2411.10397"
    )
    good_for = "features chosen by what they do to the model's loss, not by size alone"
    needs_side = "gradient"
    inference_note = "features are selected by size alone, as for any new text; gradients were used in training only"

    gradient_norm: Tensor

    def __init__(self, config: GSAEConfig) -> None:
        super().__init__(config)
        self.register_buffer("gradient_norm", torch.ones(()))

    @torch.no_grad()
    def initialise_side(self, side: Tensor) -> None:
        mean = self._check_side(side, len(side)).norm(dim=1).mean()
        if float(mean) > 0:  # all zero: nothing to prefer, so it stays TopK
            self.gradient_norm.copy_(mean)

    def encode(self, x: Tensor, side: Tensor | None = None) -> SparseCode:
        """Codes of ``(n, d_in)`` rows, selected by size alone or with their ``(n, d_out)`` gradients ``side``."""
        if side is None or self.config.beta == 0:
            return super().encode(x)
        x = self.check_input(x)
        centred = self.centre(x)
        with torch.no_grad():
            u = F.linear(centred, self.W_enc, self.b_enc)
            pattern = self.select(self.scores(u, self._check_side(side, len(x))))
        values = sparse_encode(centred, self.W_enc, self.b_enc, u, pattern)
        return SparseCode.from_pattern(pattern, self.activate(values, pattern))

    def scores(self, u: Tensor, side: Tensor) -> Tensor:
        """``(n, n_features)`` s, from pre-activations and gradients; where u is negative it is u, as in TopK."""
        effect = F.linear(side / self.gradient_norm, self.W_dec).abs_()
        return effect.mul_(u.clamp_min(0)).mul_(self.config.beta).add_(u)

    def loss(self, batch: TrainingBatch) -> Loss:
        if batch.side is None and self.config.beta > 0:
            raise no_side(self)
        return self.loss_of(batch, self.encode(batch.input, batch.side))

    def _check_side(self, side: Tensor, n: int) -> Tensor:
        if tuple(side.shape) != (n, self.d_out):
            raise UnweaveError(
                f"{self.name}: expected gradients of shape ({n}, {self.d_out}), one by each reconstructed row, found "
                f"{tuple(side.shape)}"
            )
        side = side.to(self.W_dec)
        if not bool(torch.isfinite(side.sum())) and not bool(torch.isfinite(side).all()):
            raise UnweaveError(f"{self.name}: the gradients hold NaN or infinity: look for an overflow in the model")
        return side
