"""top-AFA: each row gets as many features as it takes for its code to be as long as the row."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._linear import LinearConfig, LinearDictionary
from unweave.dictionaries.registry import register
from unweave.kernels.autograd import sparse_encode
from unweave.kernels.pattern import Pattern

_FIRST_LOOK = 256  # features ranked a row before all of them are


class TopAFAConfig(LinearConfig):
    """
    Attributes:
        afa_coefficient: weight of ``(||z|| - t)^2``. The paper's 1/32 (of 1/128 to 1/16) is for rows of squared norm d
            and a squared error averaged over coordinates; for rows scaled to E||x||^2 = 1 and a summed error that is
            ``d / 32``, which is what None stands for. Too small a weight fails.
        length: what t is in the loss: "input" takes ``||x||``, as the reference does; "centred" takes
            ``||x - b_dec||``, as the theory and the choice of k do. With it the bias tends to drift off the rows.
        auxk_coefficient: weight of the AuxK loss.
        k_aux: dead features per row in that loss.
    """

    afa_coefficient: NonNegativeFloat | None = None
    length: Literal["input", "centred"] = "input"
    auxk_coefficient: float = Field(1 / 32, ge=0)
    k_aux: PositiveInt = 512


@register("top_afa")
class TopAFA(LinearDictionary):
    """``z`` = the k(x) largest of ``ReLU((x - b_dec) W_enc^T)``; k(x) brings ``||z||`` nearest to ``||x - b_dec||``.

    Where atoms are nearly orthogonal, a code that reconstructs a row is about as long as the row (the approximate
    feature activation, AFA): ``| ||x||^2 - ||z||^2 | <= eps (h - 1) ||z||^2`` for h atoms of norm 1 with inner products
    of at most eps. So no k has to be chosen. Features are ranked and lengths measured by ``u_i ||d_i||``; the loss is
    ``||x - x_hat||^2 + AuxK / 32 + lambda (||z|| - t)^2``. There is no encoder bias.

    Sparsity follows from the data and is seldom high: the paper reports L0 around 2,000 of 12,288 features on GPT-2
    small, and wins over TopK only there. As in the reference, one feature at least stays silent.
    """

    Config = TopAFAConfig
    citation = (
        "Lee, Davies, Canby, Hockenmaier 2025, Evaluating and designing SAEs by approximating quasi-orthogonality"
    )
    good_for = "no k to choose: a row takes features until their length is the row's"

    gain: Tensor

    def __init__(self, config: TopAFAConfig) -> None:
        super().__init__(config)
        self.register_buffer("gain", torch.tensor(1.0))  # of code lengths over row lengths: their units may differ
        self.b_enc.requires_grad_(False)

    def _entries(self, x: Tensor) -> tuple[Pattern, Tensor]:
        centred = self.centre(x)
        with torch.no_grad():
            scores = F.linear(centred, self.W_enc)
            pattern = adaptive(scores.relu() * self.W_dec.norm(dim=1), centred.norm(dim=1) * self.gain)
        return pattern, sparse_encode(centred, self.W_enc, self.b_enc, scores, pattern)

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        return F.relu(values)

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        reconstruction = self.decode(code)
        residual = batch.target - reconstruction
        mse = residual.square().sum(1).mean()
        auxk = auxk_loss(self, batch.input, residual, batch.dead, self.config.k_aux)
        lengths = code.values * self.W_dec.norm(dim=1)[code.indices.long()]
        squares = lengths.new_zeros(len(code)).index_add(0, code.rows, lengths.square())
        wanted = (batch.input if self.config.length == "input" else self.centre(batch.input)).detach().norm(dim=1)
        short = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt() - wanted  # a root has no slope at zero
        afa = short.square().mean()
        total = mse + self.config.auxk_coefficient * auxk + self._coefficient * afa
        terms = {"mse": mse.detach(), "auxk": auxk.detach(), "afa": afa.detach()}
        return Loss(total, terms, code.detach(), reconstruction.detach())

    def initialise_map(self, sample: Tensor, target: Tensor) -> None:
        pass  # how many features it takes hangs on the lengths it starts with: turned atoms left it with one a row

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.gain.mul_(scale / (scale if out_scale is None else out_scale))

    @property
    def _coefficient(self) -> float:
        coefficient = self.config.afa_coefficient
        return self.d_in / 32 if coefficient is None else coefficient


def adaptive(lengths: Tensor, wanted: Tensor) -> Pattern:
    """Of each row the largest, as many as bring the root of the sum of their squares nearest to what is wanted.

    The first count among equals, at least one, and never all of them.

    Args:
        lengths: ``(n, m)``, 0 or more. wanted: ``(n,)``.
    """
    n, m = lengths.shape
    most = max(1, m - 1)
    k = min(most, _FIRST_LOOK)
    best = lengths.topk(k, dim=1)
    sums = best.values.square().cumsum(1).sqrt()
    if k < most and bool((sums[:, -1] < wanted).any()):
        best = lengths.topk(most, dim=1)
        sums = best.values.square().cumsum(1).sqrt()
    counts = 1 + (sums - wanted[:, None]).abs().argmin(dim=1)
    kept = torch.arange(sums.shape[1], device=sums.device) < counts[:, None]
    offsets = torch.zeros(n + 1, dtype=torch.long, device=sums.device)
    offsets[1:] = counts.cumsum(0)
    return Pattern(offsets, best.indices[kept].int(), m)
