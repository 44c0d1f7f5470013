"""Cross-layer transcoders: a feature reads one layer and writes to that layer and all later ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch, warm
from unweave.dictionaries._linear import best_gain, turned
from unweave.dictionaries._parts import Parts, PartsConfig
from unweave.dictionaries.jumprelu import _Jump
from unweave.dictionaries.registry import register
from unweave.dictionaries.relu import l1_loss
from unweave.kernels.autograd import sparse_decode, sparse_encode
from unweave.kernels.pattern import Pattern
from unweave.kernels.select.reference import select_above, select_topk


class CrossLayerTranscoderConfig(PartsConfig):
    """
    Attributes:
        n_features: of all layers together; every layer (part) has an equal share.
        activation: "topk" keeps the k features of largest ``z_i ||d_i||`` (k split evenly among the layers, so that
            no layer's code depends on a later one); "jumprelu" has a learned threshold a feature and the penalty
            ``lambda sum_i tanh(4 z_i ||d_i||)`` (the paper); "relu" the penalty ``lambda sum_i z_i ||d_i||``.
        k: features per row, over all layers. For "jumprelu", thresholds start where twice as many fire; None for
            "relu", which has none.
        penalty_coefficient: lambda, for "jumprelu" and "relu", with parts scaled to E||x^l||^2 = 1. None: 0.02 for
            "jumprelu", ``2 / sqrt(d)`` for "relu"; our choice, the paper's is for other units.
        penalty_warmup: share of training over which the penalty rises from 0; the paper's is all of it.
        bandwidth: of the thresholds' pseudo-derivative.
        auxk_coefficient, k_aux: of the AuxK loss of "topk", as there.
    """

    activation: Literal["topk", "jumprelu", "relu"] = "topk"
    k: PositiveInt | None = 32
    penalty_coefficient: NonNegativeFloat | None = None
    penalty_warmup: float = Field(1.0, ge=0, le=1)
    bandwidth: PositiveFloat = 1e-3
    auxk_coefficient: float = Field(1 / 32, ge=0)
    k_aux: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _relu_has_no_k(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "k": None} if values.get("activation") == "relu" else values

    @model_validator(mode="after")
    def _layers_fit(self) -> CrossLayerTranscoderConfig:
        if self.n_features % self.n_parts:
            raise ValueError(f"n_features must be a multiple of n_parts = {self.n_parts}, found {self.n_features}")
        least = {"topk": self.n_parts, "jumprelu": 1, "relu": 0}[self.activation]
        if not least <= (self.k or 0) <= self.n_features:
            raise ValueError(f"k is shared out among the layers: expected {least} to {self.n_features}, found {self.k}")
        return self


@register("clt")
class CrossLayerTranscoder(Parts):
    """``z^l = act(x^l W_enc^l + b_enc^l)``, ``y_hat^j = sum_(l <= j) z^l W_dec^(l,j) + b_dec^j``.

    The loss is the squared error of all layers and, by activation, AuxK / 32 or a penalty.

    A row holds the inputs of ``n_parts`` modules side by side (the MLPs of successive layers), its target their
    outputs. Feature f belongs to layer ``f // (n_features / n_parts)``; ``||d_i||`` is the norm of all that it writes.

    ``W_enc (n_features, d)`` reads a feature's own layer. ``W_dec[l] (n_features / n_parts, (n_parts - l) d)`` holds
    the atoms of layer l for the layers l, l + 1, ...: what may not be written has no parameter.
    """

    Config = CrossLayerTranscoderConfig
    citation = "Ameisen et al. 2025, Circuit tracing: revealing computational graphs in language models"
    good_for = "one feature for what a model computes once and writes in several layers; circuits"
    ordered_features = True

    def __init__(self, config: CrossLayerTranscoderConfig) -> None:
        super().__init__(config)
        n, per = config.n_parts, config.n_features // config.n_parts
        d_in, d_out = config.d_in // n, config.d_out // n
        self.W_enc = nn.Parameter(F.normalize(torch.randn(config.n_features, d_in), dim=1))
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.W_dec = nn.ParameterList(F.normalize(torch.randn(per, (n - layer) * d_out), dim=1) for layer in range(n))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        if config.activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((config.n_features,), 1e-3).log())

    # ---- encode ---------------------------------------------------------------------------------------------------

    @property
    def per_layer(self) -> int:
        """Features of one layer."""
        return self.n_features // self.n_parts

    def pre_activations(self, x: Tensor) -> Tensor:
        """``(n, n_features)``."""
        return self._scores(self._inputs(x))

    def encode(self, x: Tensor) -> SparseCode:
        inputs = self._inputs(x)
        with torch.no_grad():
            scores = self._scores(inputs)
            pattern = self._pattern(scores)
        return SparseCode.from_pattern(pattern, F.relu(self._entries(inputs, scores, pattern)))

    def _inputs(self, x: Tensor) -> Tensor:
        """``(n_parts, n, d)``, what each layer reads."""
        return self.split(self.scaled_input(self.check_input(x))).transpose(0, 1)

    def _scores(self, inputs: Tensor) -> Tensor:
        W_enc, b_enc = (p.unflatten(0, (self.n_parts, -1)) for p in (self.W_enc, self.b_enc))
        return torch.baddbmm(b_enc[:, None], inputs, W_enc.transpose(1, 2)).transpose(0, 1).flatten(1)

    def _entries(self, inputs: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
        """The scores at the entries of a pattern, differentiable without a dense gradient."""
        values = scores.reshape(-1)[pattern.flat]
        if not torch.is_grad_enabled():
            return values
        for layer, here, part in self._layers(pattern):
            at = slice(layer * self.per_layer, (layer + 1) * self.per_layer)
            found = sparse_encode(inputs[layer], self.W_enc[at], self.b_enc[at], scores[:, at], part)
            values = values.index_put((here,), found)
        return values

    def _layers(self, pattern: Pattern) -> Iterator[tuple[int, Tensor, Pattern]]:
        """Of each layer its number, which entries are its own, and their pattern among its own features."""
        layer_of = pattern.indices.div(self.per_layer, rounding_mode="floor")
        for layer in range(self.n_parts):
            here = (layer_of == layer).nonzero().squeeze(1)
            offsets = torch.zeros_like(pattern.offsets)
            offsets[1:] = torch.bincount(pattern.rows[here], minlength=pattern.n_rows).cumsum(0)
            yield layer, here, Pattern(offsets, pattern.indices[here] - layer * self.per_layer, self.per_layer)

    def _pattern(self, u: Tensor) -> Pattern:
        if self.config.activation == "relu":
            return select_above(u, 0.0)
        if self.config.activation == "jumprelu":
            return select_above(u, self.log_threshold.exp())
        ranks = (u * self.decoder_norms()).unflatten(1, (self.n_parts, -1)).unbind(1)
        shares = self._shares()
        chosen = [select_topk(rank, k) for rank, k in zip(ranks, shares)]
        indices = torch.cat(
            [p.indices.view(len(u), k) + layer * self.per_layer for layer, (p, k) in enumerate(zip(chosen, shares))],
            dim=1,
        )
        offsets = torch.arange(len(u) + 1, device=u.device) * indices.shape[1]
        return Pattern(offsets, indices.reshape(-1), self.n_features)

    def _shares(self) -> list[int]:
        """How many of the k features each layer gets."""
        k, n = self.config.k, self.n_parts
        return [min(self.per_layer, k // n + (layer < k % n)) for layer in range(n)]

    # ---- decode ---------------------------------------------------------------------------------------------------

    def decode(self, code: SparseCode) -> Tensor:
        code = self.check_code(code)
        return self.unscaled(self._written(code) + self.b_dec)

    def _written(self, code: SparseCode) -> Tensor:
        """``(n, d_out)`` before bias and scales."""
        width, values = self.d_out // self.n_parts, code.values.to(self.b_dec.dtype)
        out = [self.b_dec.new_zeros(len(code), width) for _ in range(self.n_parts)]
        for layer, here, pattern in self._layers(code.pattern):
            written = sparse_decode(values[here], self.W_dec[layer], pattern).split(width, dim=1)
            for later, piece in enumerate(written, start=layer):
                out[later] = out[later] + piece
        return torch.cat(out, dim=1)

    def decoder_directions(self) -> Tensor:
        """``(n_features, d_out)``: what each feature writes into every layer, 0 where it may not; made when asked."""
        atoms = [F.pad(W_dec.detach(), (self.d_out - W_dec.shape[1], 0)) for W_dec in self.W_dec]
        return self.unscaled(torch.cat(atoms))

    def decoder_norms(self) -> Tensor:
        """``(n_features,)``, of all that a feature writes, with every layer at one scale; differentiable."""
        squares = [
            (W_dec.unflatten(1, (self.n_parts - layer, -1)).square().sum(2) / self._units()[layer:].square()).sum(1)
            for layer, W_dec in enumerate(self.W_dec)
        ]
        return torch.cat(squares).clamp_min(1e-24).sqrt()

    def _units(self) -> Tensor:
        return self.out_scales * self.part_rms

    # ---- loss -----------------------------------------------------------------------------------------------------

    def loss(self, batch: TrainingBatch) -> Loss:
        inputs = self._inputs(batch.input)
        with torch.no_grad():
            scores = self._scores(inputs)
            pattern = self._training_pattern(scores)
        values = self._entries(inputs, scores, pattern)
        if self.config.activation == "jumprelu":
            at = self.log_threshold.exp()[pattern.indices.long()]
            values, _ = _Jump.apply(values, at, self.config.bandwidth)  # type: ignore[misc]
        code = SparseCode.from_pattern(pattern, F.relu(values))
        reconstruction = self.reconstruct(batch.input, code)
        residual = self.residual(batch, reconstruction)
        mse = residual.square().sum(1).mean()
        if self.config.activation == "topk":
            extra, name = self._auxk(inputs, residual.detach(), batch.dead), "auxk"
            total = mse + self.config.auxk_coefficient * extra
        else:
            extra, name = self._penalty(code), "sparsity"
            total = mse + self._coefficient(batch.progress) * extra
        return Loss(total, {"mse": mse.detach(), name: extra.detach()}, code.detach(), reconstruction.detach())

    def _training_pattern(self, u: Tensor) -> Pattern:
        if self.config.activation != "jumprelu":
            return self._pattern(u)
        # Entries just below their threshold give no output but do push the threshold.
        return select_above(u, self.log_threshold.exp() - self.config.bandwidth / 2)

    def _penalty(self, code: SparseCode) -> Tensor:
        norms = self.decoder_norms()
        if self.config.activation == "relu":
            return l1_loss(code, norms)
        return (4 * code.values * norms[code.indices.long()]).tanh().sum() / max(1, len(code))

    def _coefficient(self, progress: float) -> float:
        config = self.config
        default = 0.02 if config.activation == "jumprelu" else 2 / (self.d_out // self.n_parts) ** 0.5
        full = default if config.penalty_coefficient is None else config.penalty_coefficient
        return full * warm(progress, config.penalty_warmup)

    def _auxk(self, inputs: Tensor, residual: Tensor, dead: Tensor | None) -> Tensor:
        """How badly the strongest dead features of each row explain what is left over, as a share of its variance."""
        if dead is None or not bool(dead.any()) or self.config.auxk_coefficient == 0:
            return residual.new_zeros(())
        at = [own.nonzero().squeeze(1) + layer * self.per_layer for layer, own in enumerate(dead.chunk(self.n_parts))]
        u = torch.cat([F.linear(x, self.W_enc[own], self.b_enc[own]) for x, own in zip(inputs, at)], dim=1)
        features = torch.cat(at)
        chosen = select_topk(u.detach(), min(self.config.k_aux or max(1, self.d_in // 2), len(features)))
        pattern = Pattern(chosen.offsets, features[chosen.indices.long()].int(), self.n_features)
        code = SparseCode.from_pattern(pattern, F.relu(u.reshape(-1)[chosen.flat]))
        variance = (residual - residual.mean(0)).square().sum()
        return ((residual - self._written(code)).square().sum() / variance.clamp_min(1e-12)).nan_to_num(0.0)

    # ---- hooks of the trainer -------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        """Read from the mean on, and point atoms at what the target does where their features fire; our choice.

        Random atoms write into every later layer at once: the error starts at several times the variance, and the
        steps that bring it down leave most features silent.
        """
        super().initialise(sample, target)
        wanted = self.scaled_target(target).float()
        self.b_dec.copy_(wanted.mean(0))
        wanted = wanted - self.b_dec
        W_enc = self.W_enc.unflatten(0, (self.n_parts, -1))
        self.b_enc.copy_(-(W_enc @ self._inputs(sample).mean(1)[:, :, None]).flatten())
        if self.config.activation == "jumprelu":
            scores = self.pre_activations(sample[:1024])
            n = min(2 * self.config.k * len(scores), scores.numel() - 1)
            self.log_threshold.fill_(float(scores.reshape(-1).topk(n + 1).values[-1].clamp_min(1e-3).log()))
        code = self.encode(sample)
        for layer, here, pattern in self._layers(code.pattern):
            W_dec = self.W_dec[layer]
            W_dec.copy_(turned(W_dec, pattern, code.values[here], wanted[:, self.d_out - W_dec.shape[1] :]))
        gain = best_gain(self._written(code), wanted)
        for parameter in (self.W_enc, self.b_enc):
            parameter.mul_(gain)
        if self.config.activation == "jumprelu":
            self.log_threshold.add_(math.log(gain))

    @torch.no_grad()
    def fold_parts(self, into: Tensor, out_of: Tensor) -> None:
        self.W_enc.unflatten(0, (self.n_parts, -1)).mul_(into[:, None, None])
        for layer, W_dec in enumerate(self.W_dec):
            W_dec.unflatten(1, (self.n_parts - layer, -1)).div_(out_of[layer:, None])
        self.b_dec.unflatten(0, (self.n_parts, -1)).div_(out_of[:, None])

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        self.complete()
        out = scale if out_scale is None else out_scale
        self.W_enc.mul_(scale / out)
        for parameter in (self.b_enc, self.b_dec, self.part_rms):
            parameter.div_(out)
        if self.config.activation == "jumprelu":
            self.log_threshold.sub_(torch.tensor(out).log())


@register("skip_clt")
class SkipCrossLayerTranscoder(CrossLayerTranscoder):
    """``y_hat^j = sum_(l <= j) z^l W_dec^(l,j) + x^j W_skip^j + b_dec^j``: a CLT beside a linear map in every layer.

    ``W_skip (n_parts, d, d_out)`` starts at 0 and learns with the rest; everything else is as in ``clt``. As in
    ``skip_transcoder`` it is no part of ``decode``, which knows only the code. Gemma Scope 2 has published CLTs of this
    form; how they were trained is not in their files.
    """

    citation = CrossLayerTranscoder.citation + "; Google DeepMind 2025, Gemma Scope 2 (affine CLTs)"
    good_for = "one feature for what several layers write, with what is linear left to a linear map"

    def __init__(self, config: CrossLayerTranscoderConfig) -> None:
        super().__init__(config)
        n = config.n_parts
        self.W_skip = nn.Parameter(torch.zeros(n, config.d_in // n, config.d_out // n))

    def skip(self, x: Tensor) -> Tensor:
        """``(n, d_out)``, what each layer's map makes of its own input."""
        return self.unscaled(torch.bmm(self._inputs(x), self.W_skip).transpose(0, 1).flatten(1))

    def reconstruct(self, x: Tensor, code: SparseCode) -> Tensor:
        return self.decode(code) + self.skip(x)

    @torch.no_grad()
    def fold_parts(self, into: Tensor, out_of: Tensor) -> None:
        super().fold_parts(into, out_of)
        self.W_skip.mul_((into / out_of)[:, None, None])

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.W_skip.mul_(scale / (scale if out_scale is None else out_scale))
