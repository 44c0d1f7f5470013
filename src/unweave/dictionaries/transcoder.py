"""Transcoders: the input of a module encoded sparsely, its output decoded from that; with or without a linear skip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._base import Loss, TrainingBatch, warm
from unweave.dictionaries._closed_form import Backward, Fit, Step, auxk_backward, plain_fit
from unweave.dictionaries._linear import LinearConfig, LinearDictionary
from unweave.dictionaries.abs_topk import AbsTopK
from unweave.dictionaries.group_max import GroupMax, GroupMaxConfig
from unweave.dictionaries.jumprelu import JumpReLU, JumpReLUConfig
from unweave.dictionaries.registry import register
from unweave.dictionaries.relu import l1_backward, l1_loss
from unweave.dictionaries.topk import TopKConfig
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, Rule, TopKRule
from unweave.kernels.workspace import Workspace


class TranscoderConfig(LinearConfig):
    """
    Attributes:
        activation: "topk" keeps the k largest pre-activations of a row (sparsify); "relu" keeps all positive ones and
            pays for them (Dunefsky et al.).
        k: features per row, for "topk"; None for "relu", which has none.
        objective: "fvu" divides the squared error by the variance of the batch's targets (sparsify); "mse" does not.
        zero_decoder: start with ``W_dec = 0``, so that the first output is the mean target.
        auxk_coefficient: weight of the AuxK loss, for "topk"; sparsify has it off.
        k_aux: as in TopK.
        l1_coefficient: of ``sum_i z_i ||d_i||``, for "relu". None: ``1.4e-4 d_out``, which is Dunefsky's 1.4e-4
            beside ``mean((y_hat - y)^2 / ||y||)`` once targets have unit norm and errors are summed over d. Weighing
            with the norms of the atoms is our choice: theirs are free too, and could grow to make the penalty small.
        l1_warmup: share of training over which that penalty rises from 0.
    """

    subtract_bias: bool = False
    activation: Literal["topk", "relu"] = "topk"
    k: PositiveInt | None = 32
    objective: Literal["fvu", "mse"] = "fvu"
    zero_decoder: bool = True
    auxk_coefficient: float = Field(0.0, ge=0)
    k_aux: PositiveInt | None = None
    l1_coefficient: PositiveFloat | None = None
    l1_warmup: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _relu_has_no_k(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "k": None} if values.get("activation") == "relu" else values

    @model_validator(mode="after")
    def _k_fits(self) -> TranscoderConfig:
        if self.activation == "topk" and (self.k is None or self.k > self.n_features):
            raise ValueError(f"k must be at most n_features = {self.n_features}")
        return self


@register("transcoder")
class Transcoder(LinearDictionary):
    """``y_hat = z W_dec + b_dec``, ``z = TopK_k(x W_enc^T + b_enc)`` or its ReLU, loss ``||y - y_hat||^2 / var(y)``.

    Atoms have free norms. At the start ``b_dec`` is the mean target, ``b_enc = -W_enc mean(x)`` and ``W_dec = 0``.
    Any other dictionary learns a target of its own as well (``fit(rows, target=...)``); most with unit atoms begin
    with these turned to what the target does where their features fire.
    """

    Config = TranscoderConfig
    citation = (
        "Dunefsky, Chlenski, Nanda 2024, Transcoders find interpretable LLM feature circuits, arXiv:2406.11944; "
        "Paulo, Shabalin, Belrose 2025, Transcoders beat sparse autoencoders for interpretability, arXiv:2501.18823"
    )
    good_for = "what an MLP computes: from its input to its output"

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__(config)
        if config.zero_decoder:
            nn.init.zeros_(self.W_dec)

    @property
    def unit_norm(self) -> bool:
        return False

    def rule(self) -> Rule:
        return TopKRule(self.config.k) if self.config.activation == "topk" else AboveRule(0.0)

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        return F.relu(values)

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        reconstruction = self.reconstruct(batch.input, code)
        residual = batch.target - reconstruction
        mse = residual.square().sum(1).mean()
        terms = {"mse": mse.detach()}
        total = mse / self._variance(batch.target)
        if self.config.activation == "relu":
            l1 = l1_loss(code, self.W_dec.norm(dim=1))
            total, terms["l1"] = total + self._l1(batch.progress) * l1, l1.detach()
        else:
            auxk = auxk_loss(self, batch.input, residual, self._wakeable(batch), self._k_aux)
            total, terms["auxk"] = total + self.config.auxk_coefficient * auxk, auxk.detach()
        return Loss(total, terms, code.detach(), reconstruction.detach())

    def fit(self, pattern: Pattern, values: Tensor, target: Tensor, work: Workspace) -> Fit:
        fit = plain_fit(pattern, values, self.W_dec.detach(), self.b_dec.detach(), target, work)
        share = 1 / self._variance(target)
        scaled = {name: getattr(fit, name) * share for name in ("loss", "grads", "errors", "lengths", "bias")}
        return replace(fit, **scaled)

    def backward(self, step: Step) -> Backward:
        if self.config.activation == "topk":
            step = replace(step, batch=replace(step.batch, dead=self._wakeable(step.batch)))
            return auxk_backward(self, step, self._k_aux, self.config.auxk_coefficient)
        return l1_backward(self, step, self._l1(step.batch.progress))

    def _variance(self, target: Tensor) -> Tensor | float:
        """What the squared error is divided by."""
        if self.config.objective == "mse":
            return 1.0
        return (target - target.mean(0)).square().sum(1).mean().clamp_min(1e-12)

    def _wakeable(self, batch: TrainingBatch) -> Tensor | None:
        return batch.dead if self.config.auxk_coefficient else None

    def _l1(self, progress: float) -> float:
        config = self.config
        full = 1.4e-4 * self.d_out if config.l1_coefficient is None else config.l1_coefficient
        return full * warm(progress, config.l1_warmup)

    @property
    def _k_aux(self) -> int:
        return self.config.k_aux or max(1, self.d_in // 2)

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        self.b_dec.copy_(target.mean(0))
        self.read_from_mean(sample)


class Skip(LinearDictionary):
    """A mixin, first among the bases: ``x W_skip`` is added to what the code gives.

    ``W_skip (d_in, d_out)`` starts at 0. ``decode`` knows only the code, so it gives ``z W_dec + b_dec``; the whole
    is ``reconstruct(x, code)`` or the dictionary called on rows.
    """

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.W_skip = nn.Parameter(torch.zeros(config.d_in, config.d_out))

    def skip(self, x: Tensor) -> Tensor:
        return self.check_input(x) @ self.W_skip

    def reconstruct(self, x: Tensor, code: SparseCode) -> Tensor:
        return self.decode(code) + self.skip(x)

    def loss(self, batch: TrainingBatch) -> Loss:
        """The architecture's own loss, on what the linear map leaves of the target."""
        skip = self.skip(batch.input)
        loss = super().loss(replace(batch, target=batch.target - skip))
        assert isinstance(loss.reconstruction, Tensor)
        return replace(loss, reconstruction=loss.reconstruction + skip.detach())

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.W_skip.mul_(scale / (scale if out_scale is None else out_scale))


@register("skip_transcoder")
class SkipTranscoder(Skip, Transcoder):
    """``y_hat = z W_dec + x W_skip + b_dec``: a linear map takes what is linear, the features are left with the rest.

    ``W_skip (d_in, d_out)`` starts at 0. ``decode`` knows only the code, so it gives ``z W_dec + b_dec``; the whole
    is ``reconstruct(x, code)`` or the dictionary called on rows.
    """

    citation = (
        "Paulo, Shabalin, Belrose 2025, Transcoders beat sparse autoencoders for interpretability, arXiv:2501.18823"
    )
    good_for = "an MLP's input to its output, with what is linear left to a linear map"

    def loss(self, batch: TrainingBatch) -> Loss:
        return Transcoder.loss(self, batch)  # which reconstructs with the skip, and divides by all of the variance


class JumpReLUSkipTranscoderConfig(JumpReLUConfig):
    """As for jumprelu."""

    subtract_bias: bool = False


@register("jumprelu_skip_transcoder")
class JumpReLUSkipTranscoder(Skip, JumpReLU):
    """``y_hat = z W_dec + x W_skip + b_dec`` with ``z = u 1[u > theta]``: JumpReLU beside a linear map.

    Its loss is JumpReLU's on what the linear map leaves of the target. As in ``skip_transcoder``, the skip starts at 0
    and is no part of ``decode``. Gemma Scope 2 has published transcoders of this form; how they were trained is not in
    their files, so loss and defaults are those of ``jumprelu``, which is our choice.
    """

    Config = JumpReLUSkipTranscoderConfig
    citation = (
        "Google DeepMind 2025, Gemma Scope 2 (affine transcoders); the skip: Paulo et al. 2025, arXiv:2501.18823; "
        "JumpReLU: Rajamanoharan et al. 2024, arXiv:2407.14435"
    )
    good_for = "an MLP's input to its output at a chosen L0, with what is linear left to a linear map"


class GroupMaxSkipTranscoderConfig(GroupMaxConfig):
    """As for group_max."""

    subtract_bias: bool = False


@register("group_max_skip_transcoder")
class GroupMaxSkipTranscoder(Skip, GroupMax):
    """``y_hat = z W_dec + x W_skip + b_dec`` with the largest u of each of k groups: GroupMax beside a linear map.

    Its loss is GroupMax's on what the linear map leaves of the target; the skip starts at 0 and is no part of
    ``decode``. sparsify trains skip transcoders of this form, with the loss of ``skip_transcoder``.
    """

    Config = GroupMaxSkipTranscoderConfig
    citation = SkipTranscoder.citation + "; " + GroupMax.citation
    good_for = "skip transcoders with the cheapest selection"


class AbsTopKSkipTranscoderConfig(TopKConfig):
    """As for topk."""

    subtract_bias: bool = False


@register("abs_topk_skip_transcoder")
class AbsTopKSkipTranscoder(Skip, AbsTopK):
    """``y_hat = z W_dec + x W_skip + b_dec`` with the k largest ``|u|`` of either sign: AbsTopK beside a linear map.

    Its loss is AbsTopK's on what the linear map leaves of the target; the skip starts at 0 and is no part of
    ``decode``. sparsify's checkpoints say ``signed`` for this.
    """

    Config = AbsTopKSkipTranscoderConfig
    citation = SkipTranscoder.citation + "; " + AbsTopK.citation
    good_for = "transcoders whose features serve both directions of an axis, with what is linear left to a linear map"
