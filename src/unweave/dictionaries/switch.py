"""Switch: a router sends every row to one of several small encoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._linear import LinearConfig, LinearDictionary, geometric_median
from unweave.dictionaries.registry import register
from unweave.kernels.autograd import sparse_encode
from unweave.kernels.pattern import Pattern
from unweave.kernels.select.reference import select_topk


class SwitchConfig(LinearConfig):
    """
    Attributes:
        k: features per row.
        n_experts: E; each has ``n_features / E`` features, neighbours of each other.
        balance_coefficient: alpha, for inputs scaled to E||x||^2 = 1 (the paper's code multiplies by d, for a mean
            square of 1 in each coordinate). 0.1 is our choice, between its class's 0.01 and its launch script's 3.
    """

    k: PositiveInt = 32
    n_experts: PositiveInt = 8
    balance_coefficient: float = Field(0.1, ge=0)

    @model_validator(mode="after")
    def _experts_fit(self) -> SwitchConfig:
        if self.n_features % self.n_experts:
            raise ValueError(f"n_experts must divide n_features = {self.n_features}")
        if self.k > self.n_features // self.n_experts:
            raise ValueError(f"k must be at most the {self.n_features // self.n_experts} features of an expert")
        return self


@register("switch")
class Switch(LinearDictionary):
    """``p = softmax((x - b_router) W_router^T)``, ``z = p_e ReLU(TopK_k(u))`` within the expert e of the largest p.

    The loss is ``||x - x_hat||^2 + alpha E sum_e f_e P_e``, f being the share of rows an expert gets and P its mean
    probability: least, alpha, where all experts are used alike. Encoding a row costs one expert, 1 / E of the whole
    encoder; all experts decode into the same space. There is no AuxK. The encoder has a bias (our choice; the paper's
    has none), so that one expert is exactly TopK.
    """

    Config = SwitchConfig
    citation = "Mudide et al. 2025, Efficient dictionary learning with switch sparse autoencoders, arXiv:2410.08201"
    good_for = "many features at the encoding cost of few: each row is sent to one expert"
    ordered_features = True

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__(config)
        # Rows of norm 1 get logits of variance 1: every expert has its rows from the start, and none of them all.
        self.W_router = nn.Parameter(torch.randn(config.n_experts, config.d_in))
        self.b_router = nn.Parameter(torch.zeros(config.d_in))

    def route(self, x: Tensor) -> Tensor:
        """``(n, n_experts)`` probabilities."""
        return F.linear(x - self.b_router, self.W_router).softmax(1)

    def encode(self, x: Tensor) -> SparseCode:
        x = self.check_input(x)
        return self._code(x, self.route(x))

    def _code(self, x: Tensor, chances: Tensor) -> SparseCode:
        """Expert by expert, each on its own rows."""
        E, k, n = self.config.n_experts, self.config.k, len(x)
        centred, (chance, expert) = self.centre(x), chances.max(1)
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=E).tolist()
        indices, values = [], []
        blocks = zip(self.W_enc.chunk(E), self.b_enc.chunk(E), centred[order].split(counts))
        for number, (W_enc, b_enc, rows) in enumerate(blocks):
            with torch.no_grad():
                scores = F.linear(rows, W_enc, b_enc)
                pattern = select_topk(scores, k)
            indices.append(pattern.indices + number * len(W_enc))
            values.append(sparse_encode(rows, W_enc, b_enc, scores, pattern))
        back = order.argsort()
        found, u = torch.cat(indices).view(n, k)[back], torch.cat(values).view(n, k)[back]
        pattern = Pattern(torch.arange(n + 1, device=x.device) * k, found.reshape(-1), self.n_features)
        return SparseCode.from_pattern(pattern, (chance[:, None] * F.relu(u)).reshape(-1))

    def loss(self, batch: TrainingBatch) -> Loss:
        x = self.check_input(batch.input)
        chances = self.route(x)
        code = self._code(x, chances)
        trained, mse, reconstruction = self.errors(code, batch.target)
        balance = self.imbalance(chances)
        total = trained + self.config.balance_coefficient * balance
        return Loss(total, {"mse": mse.detach(), "balance": balance.detach()}, code.detach(), reconstruction.detach())

    def imbalance(self, chances: Tensor) -> Tensor:
        """``E sum_e f_e P_e``: 1 where experts are used alike, E where one of them is used alone."""
        E = self.config.n_experts
        shares = torch.bincount(chances.argmax(1), minlength=E) / max(1, len(chances))
        return E * (shares.to(chances) * chances.sum(0) / max(1, len(chances))).sum()

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        super().initialise(sample, target)
        self.b_router.copy_(geometric_median(sample.float()))
        # Unit inputs give reconstructions of unit norm on average, as in TopK.
        unit = F.normalize(self.centre(sample), dim=1)
        code = self._code(unit + self.b_dec if self.config.subtract_bias else unit, self.route(sample))
        gain = (self.decode(code) - self.b_dec).norm(dim=1).mean()
        if float(gain) > 0:
            self.W_enc.div_(gain)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.W_router.mul_(scale)
        self.b_router.div_(scale)
