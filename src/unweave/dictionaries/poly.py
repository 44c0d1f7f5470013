"""PolySAE: features may multiply each other on the way out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._linear import LinearDictionary
from unweave.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from unweave.dictionaries.matryoshka import Matryoshka, MatryoshkaConfig
from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.kernels.autograd import sparse_decode
from unweave.kernels.prefixes.reference import group_of

_ROOM = 2**24  # numbers worked on at a time when all pairs are looked at


class PolyTopKConfig(TopKConfig):
    """
    Attributes:
        rank: columns of U; d_out when None (fewer, if there are fewer features).
        rank2, rank3: how many of them the squares and the cubes use; 64 on GPT-2 small and 128 on wider models in the
            paper. At most ``rank``.
        lambda2, lambda3: where the learned weights of the squares and the cubes start.
    """

    rank: PositiveInt | None = None
    rank2: PositiveInt | None = None
    rank3: PositiveInt | None = None
    lambda2: float = -0.5
    lambda3: float = 0.5

    @model_validator(mode="after")
    def _ranks_fit(self) -> PolyTopKConfig:
        most = min(self.d_out, self.n_features) if self.rank is None else self.rank
        if most > self.n_features:
            raise ValueError(f"rank must be at most n_features = {self.n_features}: U has orthonormal columns")
        if max(self.rank2 or 1, self.rank3 or 1) > most:
            raise ValueError(f"rank2 and rank3 must be at most rank = {most}")
        return self

    def ranks(self) -> tuple[int, int, int]:
        """Of the linear, the quadratic and the cubic part."""
        rank = self.rank or min(self.d_out, self.n_features)
        return rank, self.rank2 or min(64, rank), self.rank3 or min(64, rank)


class PolyBatchTopKConfig(PolyTopKConfig, BatchTopKConfig):
    """Fields of both."""


class PolyMatryoshkaConfig(PolyTopKConfig, MatryoshkaConfig):
    """Fields of both."""


class Interaction(NamedTuple):
    """Two features that write something more where both fire: ``z_i z_j strength direction``."""

    i: int
    j: int
    strength: float
    direction: Tensor  # (d_out,), of norm 1


class _Polynomial(LinearDictionary):
    """The decoder, over whatever encoder stands beside it."""

    linear_decoder = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self._parameters["W_dec"]  # what features write follows from U and C1
        (rank, rank2, rank3), m, d = config.ranks(), config.n_features, config.d_out
        self.U = nn.Parameter(torch.linalg.qr(torch.randn(m, rank)).Q)
        self.C1, self.C2, self.C3 = (nn.Parameter(_kaiming(d, r)) for r in (rank, rank2, rank3))
        self.lambda2 = nn.Parameter(torch.tensor(config.lambda2))
        self.lambda3 = nn.Parameter(torch.tensor(config.lambda3))
        with torch.no_grad():
            # Atoms of norm 1, on average, as the base has them: with shorter ones codes are longer, and their squares
            # and cubes begin at many times the rows.
            self.C1.div_(self.W_dec.norm(dim=1).mean())
            if config.d_in == config.d_out:  # tied at the start, as the base is
                self.W_enc.copy_(F.normalize(self.W_dec, dim=1))

    @property
    def W_dec(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """``(n_features, d_out)``, ``U C1^T``: what each feature writes to first order."""
        return self.U @ self.C1.T

    @property
    def unit_norm(self) -> bool:
        return False

    def decode(self, code: SparseCode) -> Tensor:
        code = self.check_code(code)
        return self.polynomial(sparse_decode(code.values.to(self.U.dtype), self.U, code.pattern)) + self.b_dec

    def polynomial(self, a: Tensor) -> Tensor:
        """``(n, d_out)`` from ``a = z U (n, rank)``, without the bias."""
        second, third = self._units
        square, cube = a[:, : self.C2.shape[1]].square(), a[:, : self.C3.shape[1]].pow(3)
        return a @ self.C1.T + second * (square @ self.C2.T) + third * (cube @ self.C3.T)

    @property
    def _units(self) -> tuple[Tensor, Tensor]:
        """Of the squares and the cubes: the paper's lambdas are for rows of squared norm d, ours have 1."""
        return self.lambda2 * self.d_out**0.5, self.lambda3 * self.d_out

    def decoder_directions(self) -> Tensor:
        return self.W_dec.detach()

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        reconstruction = self.decode(code)
        residual = batch.target - reconstruction
        mse = residual.square().sum(1).mean()
        return self._with_auxk(mse, mse, residual, code, batch)

    def _with_auxk(self, fit: Tensor, mse: Tensor, residual: Tensor, code: SparseCode, batch: TrainingBatch) -> Loss:
        auxk = auxk_loss(self, batch.input, residual, batch.dead, self.config.k_aux or max(1, self.d_in // 2))
        terms = {"mse": mse.detach(), "auxk": auxk.detach()}
        return Loss(fit + self.config.auxk_coefficient * auxk, terms, code.detach(), (batch.target - residual).detach())

    @torch.no_grad()
    def after_step(self, loss: Loss, progress: float) -> None:
        self.U.copy_(retract(self.U))
        self.observe(loss, progress)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        out = scale if out_scale is None else out_scale
        self.lambda2.mul_(out)  # codes shrink by `out`, and their squares by its square
        self.lambda3.mul_(out**2)

    # ---- what features do to each other -----------------------------------------------------------------------

    @torch.no_grad()
    def pair(self, i: int, j: int) -> Tensor:
        """``(d_out,)`` what features i and j write together, beyond what they write alone, where both are 1.

        Twice the entry of the symmetric tensor ``B[:, i, j]`` for two features; the entry itself for i = j. Of the
        cubic part only three features say what it is.
        """
        rank = self.C2.shape[1]
        entry = self._units[0] * self.C2 @ (self.U[i, :rank] * self.U[j, :rank])
        return entry if i == j else 2 * entry

    @torch.no_grad()
    def interactions(self, n: int = 20, among: Tensor | None = None) -> list[Interaction]:
        """The ``n`` pairs of different features that change each other's output the most, strongest first.

        Args:
            among: ``(s,)`` the features to look at; all when None, and then every pair is weighed, some
                ``n_features^2 rank2^2`` multiplications.
        """
        features = torch.arange(self.n_features, device=self.U.device) if among is None else among.long().unique()
        rows = self.U[features, : self.C2.shape[1]]
        root = torch.linalg.qr(self.C2, mode="r").R.T  # C2 u is as long as u root, in fewer numbers
        found = [(torch.empty(0, device=rows.device), torch.empty(0, dtype=torch.long, device=rows.device))]
        step = max(1, _ROOM // max(1, rows.numel()))
        for lo in range(0, len(rows), step):
            norms = ((rows[lo : lo + step, None] * rows) @ root).norm(dim=2)
            norms = norms.triu(lo + 1).reshape(-1)
            best = norms.topk(min(n, len(norms)))
            found.append((best.values.float(), best.indices + lo * len(rows)))
        values, flat = (torch.cat(parts) for parts in zip(*found))
        best = values.topk(min(n, len(values)))
        pairs = [divmod(at, len(rows)) for at in flat[best.indices[best.values > 0]].tolist()]
        named = [(int(features[i]), int(features[j])) for i, j in pairs]
        written = [(i, j, self.pair(i, j)) for i, j in named]
        return [Interaction(i, j, float(v.norm()), F.normalize(v, dim=0)) for i, j, v in written]


@register("poly_topk")
class PolyTopK(_Polynomial, TopK):
    """TopK with ``a = z U``, ``x_hat = b + C1 a + lambda2 C2 a[:r2]^2 + lambda3 C3 a[:r3]^3``; ``U^T U = I``.

    Squares and cubes are by entry, so that every pair and triple of features has an output of its own, of low rank.
    ``a`` is summed from the entries of the code alone. After each step U is brought back to orthonormal columns. The
    paper's lambdas (-1/2 and 1/2 at the start, learned) go with rows of squared norm d: for rows scaled to
    E||x||^2 = 1 the squares count sqrt(d) and the cubes d times as much. Our choices: the encoder starts as the linear
    part's transpose, and AuxK lets dead features write with the linear part only.
    """

    Config = PolyTopKConfig
    citation = "Koromilas, Demou, Oldfield, Panagakis, Nicolaou 2026, PolySAE: polynomial sparse autoencoders, ICML"
    good_for = "what two or three features together mean beyond their sum"


@register("poly_batch_topk")
class PolyBatchTopK(_Polynomial, BatchTopK):
    """BatchTopK with the polynomial decoder of poly_topk."""

    Config = PolyBatchTopKConfig
    citation = PolyTopK.citation
    good_for = "interactions of features, with a budget for the batch"


@register("poly_matryoshka")
class PolyMatryoshka(_Polynomial, Matryoshka):
    """Matryoshka with the polynomial decoder of poly_topk: every prefix of the features is decoded by the polynomial.

    (The reference decodes prefixes by a linear decoder that nothing else trains.)
    """

    Config = PolyMatryoshkaConfig
    citation = PolyTopK.citation
    good_for = "interactions of features at several levels of detail"

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        ends, weights = self._prefixes()
        group, a = group_of(code.pattern, ends), self.U.new_zeros(())
        residual = mse = fit = a
        for number, weight in enumerate(weights):
            a = a + sparse_decode(code.values * (group == number), self.U, code.pattern)
            residual = batch.target - self.polynomial(a) - self.b_dec
            mse = residual.square().sum(1).mean()
            fit = fit + weight * mse
        return self._with_auxk(fit, mse, residual, code, batch)


def retract(U: Tensor) -> Tensor:
    """The orthonormal columns of the QR decomposition of ``U (m, r)`` whose R has a positive diagonal.

    By the Cholesky factor of ``U^T U``, which costs a product where U is nearly orthonormal, as it is after a step.
    """
    upper, failed = torch.linalg.cholesky_ex(U.T @ U, upper=True)
    if not int(failed):
        Q = torch.linalg.solve_triangular(upper, U, upper=True, left=False)
        if float((Q.T @ Q).diagonal().sub(1).abs().max()) < 64 * torch.finfo(U.dtype).eps:
            return Q
    Q, R = torch.linalg.qr(U)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q)


def _kaiming(d: int, rank: int) -> Tensor:
    weights = torch.empty(d, rank)
    nn.init.kaiming_uniform_(weights, a=5**0.5)
    return weights
