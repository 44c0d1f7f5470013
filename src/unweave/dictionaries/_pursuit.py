"""The shared body of dictionaries whose encoder is a pursuit on the atoms that decode: one matrix does both."""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary, DictionaryConfig, Loss
from unweave.dictionaries._linear import remove_parallel_gradient
from unweave.errors import UnweaveError
from unweave.kernels.autograd import sparse_decode
from unweave.kernels.backend import fastest
from unweave.kernels.pattern import Pattern


class PursuitConfig(DictionaryConfig):
    """Fields of the pursuit architectures.

    Attributes:
        k: picks a row, at most; an atom picked again is still one feature.
    """

    k: PositiveInt = 32

    @model_validator(mode="after")
    def _fits(self) -> PursuitConfig:
        if self.k > self.n_features:
            raise ValueError(f"k must be at most n_features = {self.n_features}")
        if self.d_in != self.d_out:
            raise ValueError(
                "a pursuit takes its codes from the rows it reconstructs, so d_in and d_out must be equal, found "
                f"{self.d_in} and {self.d_out}: use another architecture where the target is not the input"
            )
        return self


@dataclass(frozen=True)
class PursuitSteps:
    """A pursuit, pick by pick: ``x - b = sum over t of values[t] atom[t] + what is left``.

    Attributes:
        atoms: ``(n, t)`` int32, the atom of each pick, -1 after a row's last.
        values: ``(n, t)``, what each pick added to its feature.
        norms: ``(n, t + 1)``, of the residual before the first pick and after each; equal numbers after the last.
        residual: ``(n, d)``, what the last pick left.
        n_features: the number of atoms.
    """

    atoms: Tensor
    values: Tensor
    norms: Tensor
    residual: Tensor
    n_features: int

    def code(self, t: int) -> SparseCode:
        """The code after ``t`` picks."""
        atoms, values = self.atoms[:, :t], self.values[:, :t]
        rows = torch.arange(len(atoms), device=atoms.device)[:, None].expand_as(atoms)[atoms >= 0]
        flat, entry = (rows * self.n_features + atoms[atoms >= 0]).unique(return_inverse=True)
        sums = values.new_zeros(len(flat)).index_add_(0, entry, values[atoms >= 0])
        offsets = torch.searchsorted(flat, torch.arange(len(atoms) + 1, device=flat.device) * self.n_features)
        return SparseCode.from_pattern(Pattern(offsets, (flat % self.n_features).int(), self.n_features), sums)


class PursuitDictionary(Dictionary):
    """``z`` is a pursuit of ``x - b_dec`` with the atoms ``W_dec``, and ``x_hat = z W_dec + b_dec``, if with a bias.

    One matrix encodes and decodes, so there is no encoder to fold a scale into, and none is needed: codes and outputs
    grow with the input.

    Args:
        bias: whether there is a ``b_dec``. tolerance: the residual norm at which a row is done, None for no such end.
    """

    Config = PursuitConfig
    b_dec: nn.Parameter | None
    tolerance: Tensor

    def __init__(self, config: PursuitConfig, *, bias: bool = False, tolerance: float | None = None) -> None:
        super().__init__(config)
        self.W_dec = nn.Parameter(F.normalize(torch.randn(config.n_features, config.d_out), dim=1))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out)) if bias else None
        self.register_buffer("tolerance", torch.tensor(-1.0 if tolerance is None else tolerance))  # below 0: none

    # ---- what subclasses choose -------------------------------------------------------------------------------

    def pursue(self, rows: Tensor) -> tuple[Pattern, Tensor]:
        """The code of centred rows, without a gradient."""
        raise NotImplementedError

    @property
    def unit_norm(self) -> bool:
        """Whether atoms stay on the unit sphere."""
        return True

    # ---- the contract -----------------------------------------------------------------------------------------

    def centre(self, x: Tensor) -> Tensor:
        return x if self.b_dec is None else x - self.b_dec

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCode:
        return SparseCode.from_pattern(*self.pursue(self.centre(self.check_input(x))))

    def decode(self, code: SparseCode) -> Tensor:
        code = self.check_code(code)
        out = sparse_decode(code.values.to(self.W_dec.dtype), self.W_dec, code.pattern)
        return out if self.b_dec is None else out + self.b_dec

    def decoder_directions(self) -> Tensor:
        return self.W_dec.detach()

    def stop_at(self) -> float | None:
        """The residual norm at which a row is done, in the units of the rows."""
        tolerance = float(self.tolerance)
        return tolerance if tolerance >= 0 else None

    # ---- hooks of the trainer ---------------------------------------------------------------------------------

    def default_lr(self) -> float:
        return 5e-4

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        if target is not sample:
            raise UnweaveError(
                f"{self.name}: a pursuit takes its codes from the rows it reconstructs and cannot learn a target of "
                "its own: use another architecture for a transcoder"
            )
        if self.b_dec is not None:
            self.b_dec.copy_(sample.mean(0))

    @torch.no_grad()
    def before_step(self) -> None:
        if self.unit_norm:
            remove_parallel_gradient(self.W_dec)

    @torch.no_grad()
    def after_step(self, loss: Loss, progress: float) -> None:
        if self.unit_norm:
            self.W_dec.copy_(F.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        if out_scale not in (None, scale):
            raise UnweaveError(f"{self.name}: input and target are the same rows, found scales {scale} and {out_scale}")
        if self.b_dec is not None:
            self.b_dec.div_(scale)
        if float(self.tolerance) >= 0:
            self.tolerance.div_(scale)


class MatchingDictionary(PursuitDictionary):
    """A pursuit that never goes back on a pick, so that it can be told pick by pick."""

    def match(self, rows: Tensor, trail: Tensor | None = None) -> tuple[Pattern, Tensor]:
        """As ``pursue``, and writes the picks into ``trail`` (n, k) int32."""
        raise NotImplementedError

    def pursue(self, rows: Tensor) -> tuple[Pattern, Tensor]:
        return self.match(rows)

    @torch.no_grad()
    def steps(self, x: Tensor) -> PursuitSteps:
        """The pursuit of ``(n, d)`` rows, pick by pick."""
        rows = self.centre(self.check_input(x))
        trail = self.new_trail(rows)
        self.match(rows, trail)
        values, residual = chain(rows, self.W_dec, trail)
        left, norms = rows, [rows.norm(dim=1)]
        for t in range(trail.shape[1]):
            left = left - values[:, t, None] * self.W_dec[trail[:, t].clamp_min(0).long()]
            norms.append(left.norm(dim=1))
        return PursuitSteps(trail, values, torch.stack(norms, 1), residual, self.n_features)

    def new_trail(self, rows: Tensor) -> Tensor:
        return torch.empty(len(rows), self.config.k, dtype=torch.int32, device=rows.device)


def pursuit_ops(W: Tensor) -> Any:
    """The kernels of the pursuits that are fastest for these atoms."""
    return fastest(W).pursuit


class _Chain(torch.autograd.Function):
    """The values and the last residual of a pursuit whose picks are known.

    Forward ``c_t = <r_{t-1}, d_t>``, ``r_t = r_{t-1} - c_t d_t``. Backward, with g the gradient by r_t and
    ``s = dL/dc_t - <g, d_t>``: ``dL/dd_t = -c_t g + s r_{t-1}``, and g becomes ``g + s d_t``. Residuals are worked out
    again from the last one, so memory does not grow with the number of picks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, W: Tensor, trail: Tensor) -> tuple[Tensor, Tensor]:
        residual, values = rows.clone(), rows.new_zeros(trail.shape)
        for t in range(trail.shape[1]):
            atoms = W[trail[:, t].clamp_min(0).long()]
            values[:, t] = (residual * atoms).sum(1) * (trail[:, t] >= 0)
            residual -= values[:, t, None] * atoms
        ctx.save_for_backward(W, trail, values, residual)
        return values, residual

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        by_values, g = grads[0], grads[1].clone()
        W, trail, values, residual = ctx.saved_tensors
        by_W = torch.zeros_like(W)
        for t in range(trail.shape[1] - 1, -1, -1):
            at = trail[:, t].clamp_min(0).long()
            atoms, value = W[at], values[:, t, None]
            residual = residual + value * atoms
            s = ((by_values[:, t] - (g * atoms).sum(1)) * (trail[:, t] >= 0))[:, None]
            by_W.index_add_(0, at, s * residual - value * g)
            g += s * atoms
        return g, by_W, None


def chain(rows: Tensor, W: Tensor, trail: Tensor) -> tuple[Tensor, Tensor]:
    """Follow picks that are known: ``(n, t)`` values and the ``(n, d)`` residual, differentiable in rows and atoms.

    The picks themselves are not differentiated.

    Args:
        rows: ``(n, d)``. W: ``(m, d)`` atoms. trail: ``(n, t)`` int32, the atom of each pick, -1 for none.
    """
    out: Any = _Chain.apply(rows, W, trail)
    return out


def used(trail: Tensor) -> Tensor:
    """The columns of a trail in which any row has a pick."""
    return trail[:, : int((trail >= 0).any(0).sum())]
