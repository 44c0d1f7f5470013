"""Crosscoders: one code for several sites at once, and what it says about the difference between two models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._base import Dictionary, Loss, TrainingBatch, warm
from unweave.dictionaries._linear import LinearDictionary, best_gain, fold_decoder_norms
from unweave.dictionaries._parts import Parts, PartsConfig
from unweave.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from unweave.dictionaries.registry import register
from unweave.dictionaries.relu import l1_loss
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.errors import UnweaveError
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, Rule, reference, select

_INITIAL_NORM = 0.08  # of a feature's atom in each part


class _Crosscoder(Parts, LinearDictionary):
    """What crosscoders share: ``u = sum_l x^l W_enc^l + b_enc``, ``x_hat^l = z W_dec^l + b_dec^l``, free norms.

    ``W_enc`` and ``W_dec`` are those of a linear dictionary for the whole row: a part is a block of their columns.
    """

    def __init__(self, config: PartsConfig) -> None:
        super().__init__(config)
        with torch.no_grad():
            atoms = F.normalize(torch.randn(config.n_features, config.n_parts, config.d_out // config.n_parts), dim=2)
            self.W_dec.copy_(_INITIAL_NORM * atoms.flatten(1))
            self.W_enc.copy_(self.W_dec if config.d_in == config.d_out else F.normalize(self.W_enc, dim=1) * 0.1)

    @property
    def unit_norm(self) -> bool:
        return False

    def centre(self, x: Tensor) -> Tensor:
        return self.scaled_input(x)

    def decode(self, code: SparseCode) -> Tensor:
        return self.unscaled(super().decode(code))

    def decoder_directions(self) -> Tensor:
        return self.unscaled(self.W_dec.detach())

    def part_norms(self) -> Tensor:
        """``(n_features, n_parts)``: the norm of each feature's atom in a part, in units of the part's typical norm.

        So two sites, one ten times as long as the other, can be compared. Before and after training the same.
        """
        return self._part_norms().detach()

    def total_norms(self) -> Tensor:
        """``(n_features,)``, the sum of :meth:`part_norms` over the parts; differentiable."""
        return self._part_norms().sum(1)

    def _part_norms(self) -> Tensor:
        return self.split(self.W_dec).norm(dim=2) / (self.out_scales * self.part_rms)

    def part_atoms(self) -> Tensor:
        """``(n_features, n_parts, d)``: what each feature writes into each part, in the units of the target."""
        return self.split(self.decoder_directions())

    @torch.no_grad()
    def fold_parts(self, into: Tensor, out_of: Tensor) -> None:
        self.split(self.W_enc).mul_(into[:, None])
        self.split(self.W_dec).div_(out_of[:, None])
        self.b_dec.copy_(self.b_dec.view(self.n_parts, -1).div(out_of[:, None]).flatten())

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        fold_decoder_norms(self)


class CrosscoderConfig(PartsConfig):
    """
    Attributes:
        l1_coefficient: for parts scaled to E||x^l||^2 = 1. None: ``2 / sqrt(d)`` with d the width of a part, which is
            the published 2 at E||x^l|| = sqrt(d).
        l1_warmup: share of training over which the penalty rises from 0.
    """

    l1_coefficient: PositiveFloat | None = None
    l1_warmup: float = Field(0.05, ge=0, le=1)


@register("crosscoder")
class Crosscoder(_Crosscoder):
    """``z = ReLU(sum_l x^l W_enc^l + b_enc)``, loss ``sum_l ||x^l - x_hat^l||^2 + lambda sum_i z_i sum_l ||d_i^l||``.

    A row holds the activations of ``n_parts`` sites side by side. A feature that a site has no use for ends with an
    atom of norm 0 there. The penalty makes some of these by itself where a feature is only weak in a site (Minder et
    al. 2025, arXiv:2504.02922); the TopK forms do not.
    """

    Config = CrosscoderConfig
    citation = "Lindsey et al. 2024, Sparse crosscoders for cross-layer features and model diffing"
    good_for = "what layers share, or what two models on the same text share and do not"
    lr_at_16k = 5e-5

    def rule(self) -> Rule:
        return AboveRule(0.0)

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        reconstruction = self.decode(code)
        mse = self.residual(batch, reconstruction).square().sum(1).mean()
        l1 = l1_loss(code, self.total_norms())
        total = mse + self._coefficient(batch.progress) * l1
        return Loss(total, {"mse": mse.detach(), "l1": l1.detach()}, code.detach(), reconstruction.detach())

    def _coefficient(self, progress: float) -> float:
        config = self.config
        default = 2 / (self.d_in // self.n_parts) ** 0.5
        full = default if config.l1_coefficient is None else config.l1_coefficient
        return full * warm(progress, config.l1_warmup)


class TopKCrosscoderConfig(PartsConfig, TopKConfig):
    pass


class BatchTopKCrosscoderConfig(PartsConfig, BatchTopKConfig):
    pass


class _Ranked(_Crosscoder, TopK):
    """Features are ranked by ``z_i sum_l ||d_i^l||``, what they write; the code holds ``z_i``.

    So the choice does not change where code and atom trade scale, and no norm has to be kept fixed.
    """

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        """As in ``topk``, but with the encoder's gain of least error, our choice: unit gain writes twice too much."""
        super().initialise(sample, target)
        written = self.scaled_target(self.decode(self.encode(sample))) - self.b_dec
        self.W_enc.mul_(best_gain(written, self.scaled_target(target) - self.b_dec))

    def select(self, scores: Tensor) -> Pattern:
        return select(reference, self.rule(), scores * self.total_norms().detach())[0]

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        reconstruction = self.decode(code)
        residual = self.residual(batch, reconstruction)
        mse = residual.square().sum(1).mean()
        auxk = auxk_loss(self, batch.input, residual, batch.dead, self._k_aux)
        total = mse + self.config.auxk_coefficient * auxk
        return Loss(total, {"mse": mse.detach(), "auxk": auxk.detach()}, code.detach(), reconstruction.detach())


@register("topk_crosscoder")
class TopKCrosscoder(_Ranked):
    """A crosscoder that keeps the k features of a row with the largest ``z_i sum_l ||d_i^l||``, with AuxK."""

    Config = TopKCrosscoderConfig
    citation = Crosscoder.citation + "; Gao et al. 2024, arXiv:2406.04093"
    good_for = "crosscoders with a fixed budget a row"


@register("batch_topk_crosscoder")
class BatchTopKCrosscoder(_Ranked, BatchTopK):
    """A crosscoder that keeps the ``k n`` largest ``z_i sum_l ||d_i^l||`` of a batch of ``n`` rows, with AuxK.

    Without the L1 penalty a feature that both models have is not pushed to belong to one. Inference keeps what
    exceeds a threshold on the same score, see ``batch_topk``.
    """

    Config = BatchTopKCrosscoderConfig
    citation = "Minder, Dumas et al. 2025, Overcoming sparsity artifacts in crosscoders, arXiv:2504.02922"
    good_for = "crosscoders at a chosen L0"

    @torch.no_grad()
    def observe(self, loss: Loss, progress: float) -> None:
        assert loss.code is not None
        code = loss.code
        scores = code.values * self.total_norms().detach()[code.indices.long()]
        super().observe(Loss(loss.total, code=SparseCode.from_pattern(code.pattern, scores)), progress)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        threshold = self.threshold.clone()  # part norms are relative, so the scores stay as they are
        super().fold_scale(scale, out_scale)
        self.threshold.copy_(threshold)


def relative_norms(crosscoder: Dictionary) -> Tensor:
    """``(n_features,)``: ``r_i = ||d_i^B|| / (||d_i^A|| + ||d_i^B||)`` of a crosscoder of two parts, A and B.

    0 where only A has the feature, 1 where only B has it, 1/2 where both have it equally; nan for an atom of norm 0.

    Raises:
        UnweaveError: when it is no crosscoder, or of another number of parts.
    """
    norms = _two_parts(crosscoder).part_norms()
    return norms[:, 1] / norms.sum(1)


@dataclass(frozen=True)
class ModelDiff:
    """Which features belong to which of two models. All fields are ``(n_features,)``.

    Attributes:
        relative: r_i, see :func:`relative_norms`.
        cosine: between the feature's atoms in A and in B: whether a shared feature means the same in both.
        only_a, only_b, shared: boolean. What is in none of them lies in between, or is not alive.
    """

    relative: Tensor
    cosine: Tensor
    only_a: Tensor
    only_b: Tensor
    shared: Tensor

    def __repr__(self) -> str:
        counts = ", ".join(f"{int(getattr(self, name).sum()):,} {name}" for name in ("only_a", "only_b", "shared"))
        return f"ModelDiff({len(self.relative):,} features: {counts})"


def model_diff(
    crosscoder: Dictionary, *, exclusive: float = 0.1, even: float = 0.1, alive: Tensor | None = None
) -> ModelDiff:
    """Sort the features of a crosscoder of two parts by the model they belong to.

    Args:
        exclusive: A's own have ``r < exclusive``, B's own ``r > 1 - exclusive``.
        even: shared ones have ``|r - 1/2| <= even``. Both defaults are those of Minder et al. 2025.
        alive: ``(n_features,)`` boolean, the features that fire at all; a dead one still has the atoms it began with.

    Raises:
        UnweaveError: when it is no crosscoder, or of another number of parts.
    """
    if not (0 < exclusive < 0.5 and 0 < even < 0.5 and exclusive + even < 0.5):
        raise UnweaveError(f"model_diff: exclusive={exclusive} and even={even} overlap: they must add up to below 0.5")
    r = relative_norms(crosscoder)
    a, b = _two_parts(crosscoder).part_atoms().unbind(1)
    counts = torch.ones_like(r, dtype=torch.bool) if alive is None else alive.to(r.device)
    return ModelDiff(
        r,
        F.cosine_similarity(a, b, dim=1),
        (r < exclusive) & counts,
        (r > 1 - exclusive) & counts,
        ((r - 0.5).abs() <= even) & counts,
    )


def _two_parts(crosscoder: Dictionary) -> _Crosscoder:
    if not isinstance(crosscoder, _Crosscoder) or crosscoder.n_parts != 2:
        found = f"{crosscoder.n_parts} parts" if isinstance(crosscoder, _Crosscoder) else crosscoder.name
        raise UnweaveError(f"expected a crosscoder of two parts (two models or two sites), found {found}")
    return crosscoder
