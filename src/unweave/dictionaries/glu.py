"""GLU: a gated linear unit as encoder, in which a second matrix scales every pre-activation between 0 and 1."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from unweave.dictionaries._base import Loss, TrainingBatch, warm
from unweave.dictionaries._linear import LinearConfig, LinearDictionary
from unweave.dictionaries.registry import register
from unweave.dictionaries.relu import l1_loss
from unweave.kernels.autograd import sparse_encode
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, Rule, TopKRule


class GLUConfig(LinearConfig):
    """
    Attributes:
        activation: "topk" keeps the k largest of a row; "relu" keeps all positive ones and pays for them.
        k: features per row, for "topk"; None for "relu", which has none.
        l1_coefficient: of ``sum_i z_i``, for "relu", with inputs scaled to E||x||^2 = 1.
        l1_warmup: share of training over which that penalty rises from 0.
    """

    activation: Literal["topk", "relu"] = "topk"
    k: PositiveInt | None = 32
    l1_coefficient: PositiveFloat = 0.04
    l1_warmup: float = Field(0.05, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _relu_has_no_k(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "k": None} if values.get("activation") == "relu" else values

    @model_validator(mode="after")
    def _k_fits(self) -> GLUConfig:
        if self.activation == "topk" and (self.k is None or self.k > self.n_features):
            raise ValueError(f"k must be at most n_features = {self.n_features}")
        return self


@register("glu")
class GLU(LinearDictionary):
    """``z = act(u sigmoid((x - b_dec) W_gate^T + b_gate))``, u as elsewhere and act the k largest or ReLU.

    The loss is ``||x - x_hat||^2``, and for ReLU ``lambda sum_i z_i``. The gate starts at 1/2 for every row.
    llamascopium has encoders of this form; that there is no AuxK loss and how the gate starts are our choices.
    """

    Config = GLUConfig
    citation = "llamascopium (`use_glu_encoder`); the unit: Dauphin et al. 2017, arXiv:1612.08083"
    good_for = "checkpoints of others whose encoder has a second matrix"

    def __init__(self, config: GLUConfig) -> None:
        super().__init__(config)
        self.W_gate = nn.Parameter(torch.zeros(config.n_features, config.d_in))
        self.b_gate = nn.Parameter(torch.zeros(config.n_features))

    def rule(self) -> Rule:
        return TopKRule(self.config.k) if self.config.activation == "topk" else AboveRule(0.0)

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        return F.relu(values)

    def pre_activations(self, x: Tensor) -> Tensor:
        return super().pre_activations(x) * self._gates(self.centre(self.check_input(x))).sigmoid()

    def _gates(self, centred: Tensor) -> Tensor:
        return F.linear(centred, self.W_gate, self.b_gate)

    def _entries(self, x: Tensor) -> tuple[Pattern, Tensor]:
        centred = self.centre(x)
        with torch.no_grad():
            u, gates = F.linear(centred, self.W_enc, self.b_enc), self._gates(centred)
            pattern = self.select(u * gates.sigmoid())
        kept = sparse_encode(centred, self.W_enc, self.b_enc, u, pattern)
        return pattern, kept * sparse_encode(centred, self.W_gate, self.b_gate, gates, pattern).sigmoid()

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        total, mse, reconstruction = self.errors(code, batch.target)
        terms = {"mse": mse.detach()}
        if self.config.activation == "relu":
            l1 = l1_loss(code, self.W_dec.norm(dim=1))
            total = total + self.config.l1_coefficient * warm(batch.progress, self.config.l1_warmup) * l1
            terms["l1"] = l1.detach()
        return Loss(total, terms, code.detach(), reconstruction.detach())

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.W_gate.mul_(scale)
