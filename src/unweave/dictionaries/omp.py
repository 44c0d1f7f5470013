"""OMP: the encoder is orthogonal matching pursuit, so that codes are the best their atoms allow."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from torch import Tensor

from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._pursuit import PursuitConfig, PursuitDictionary, pursuit_ops
from unweave.dictionaries.registry import register
from unweave.kernels.pattern import Pattern


class OMPConfig(PursuitConfig):
    """
    Attributes:
        nonnegative: values of 0 or more (nonnegative least squares, as in the reference); else plain least squares,
            with values of either sign.
        tolerance: the residual norm at which a row is done, for inputs scaled to E||x||^2 = 1; None for no such end.
        subtract_bias: encode ``x - b_dec`` and add ``b_dec`` back.
    """

    nonnegative: bool = True
    tolerance: NonNegativeFloat | None = None
    subtract_bias: bool = False


@register("omp")
class OMP(PursuitDictionary):
    """k times: ``S += argmax <r, d_j>`` beyond S, ``z = argmin ||x - z_S D_S||``, ``r = x - z D``; loss ``||r||^2``.

    The gradient runs through the last decoding alone, with the code held fixed. That is no approximation: where the
    code is the least squares solution, moving it does not change the loss to first order. With nonnegative values an
    atom whose value falls to zero leaves S and may come back, which makes the pursuit Lawson and Hanson's algorithm for
    nonnegative least squares on all atoms, stopped after k picks.
    """

    Config = OMPConfig
    citation = (
        "Pati, Rezaiifar, Krishnaprasad 1993, Orthogonal matching pursuit; as the sibling of Costa et al. 2025, MP-SAE"
    )
    good_for = "the best code for given atoms, greedily; an upper bound for cheaper encoders"

    def __init__(self, config: OMPConfig) -> None:
        super().__init__(config, bias=config.subtract_bias, tolerance=config.tolerance)

    def pursue(self, rows: Tensor) -> tuple[Pattern, Tensor]:
        W, k, tolerance = self.W_dec.detach(), self.config.k, self.stop_at()
        if self.config.nonnegative:
            return pursuit_ops(W).nonnegative_pursuit(rows, W, k, tolerance=tolerance)
        return pursuit_ops(W).orthogonal_matching_pursuit(rows, W, k, tolerance=tolerance)

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        reconstruction = self.decode(code)
        mse = (batch.input - reconstruction).square().sum(1).mean()
        return Loss(mse, {"mse": mse.detach()}, code, reconstruction.detach())
