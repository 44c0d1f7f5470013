"""The training step of a linear dictionary without autograd.

Every gradient of such a dictionary is a sum over the entries of its code: ``dW_dec[f] = sum z error[row]`` and
``dW_enc[f] = sum dz x[row]``. So the step keeps the factors of these sums (:class:`Gradients`), and the optimiser
adds them up feature by feature while it updates, without ever holding a gradient matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.kernels.csc.reference import Columns
from unweave.kernels.gradients.reference import Extra
from unweave.kernels.pattern import Pattern
from unweave.kernels.threads import serial
from unweave.kernels.workspace import Workspace

if TYPE_CHECKING:
    from unweave.dictionaries._linear import LinearDictionary


@dataclass(frozen=True)
class Factors:
    """A row gradient as the sum it is: ``G[f] = sum over the entries of f of weight * A[row]``, plus what is extra."""

    columns: Columns  # the entries by feature; their rows are rows of A
    weights: Tensor  # (nnz,)
    A: Tensor  # (n, d)
    lengths: Tensor  # (n,), norms of the rows of A
    extra: Extra = field(default_factory=Extra)


@dataclass(frozen=True)
class Gradients:
    """All gradients of one step.

    Attributes:
        rows: of each weight matrix ``(n_features, d)``, by its name.
        dense: of the other parameters, by name.
    """

    rows: dict[str, Factors]
    dense: dict[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """How well a code reconstructs its target, and what follows from it for the code and the decoder.

    Attributes:
        loss: the squared errors that are trained on, averaged over rows.
        squares: ``(n,)``, squared error of the whole reconstruction.
        residual: makes ``(n, d_out)``, target minus whole reconstruction.
        grads: ``(nnz,)``, of the loss by the values.
        errors: ``(n g, d_out)``; the decoder row of a feature has the gradient ``sum value * errors[row g + group]``.
        lengths: ``(n g,)``, at least the norms of ``errors``.
        bias: ``(d_out,)``, of the loss by the decoder's bias.
        groups: ``(n_features,)`` from 0 to g - 1, or ``(nnz,)`` where ``by_entry``; None where g is 1.
        by_entry: whether it depends on the entry, and not on its feature alone, which group it belongs to.
    """

    loss: Tensor
    squares: Tensor
    residual: Callable[[], Tensor]
    grads: Tensor
    errors: Tensor
    lengths: Tensor
    bias: Tensor
    groups: Tensor | None = None
    by_entry: bool = False

    def columns(self, columns: Columns, n: int) -> Columns:
        """The entries by feature, with their rows in ``errors``."""
        if self.groups is None:
            return columns
        n_groups = len(self.errors) // max(1, n)
        groups = self.groups[columns.order] if self.by_entry else self.groups.repeat_interleave(columns.starts.diff())
        return columns._replace(rows=columns.rows * n_groups + groups)


def plain_fit(pattern: Pattern, values: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, work: Workspace) -> Fit:
    """The squared error of the reconstruction."""
    n = len(target)
    atoms = work.atoms(W_dec)
    error, grads, squares = work.ops.decode.decode_residual(pattern, values, atoms, b_dec, target, 2 / max(1, n))
    mse = squares.mean() if n else squares.sum()
    with serial(squares):
        lengths = squares.sqrt() * (2 / max(1, n))

    def residual() -> Tensor:
        return error.to(b_dec.dtype) * (-n / 2)

    return Fit(mse, squares, residual, grads, error, lengths, work.ops.rows.weighted_sum(error))


def nested_fit(
    pattern: Pattern,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    work: Workspace,
    ends: Tensor,
    weights: Tensor,
) -> Fit:
    """The squared errors of the reconstructions from prefixes of the features.

    Args:
        ends: ``(g,)`` int64, rising; prefix i holds the features below ``ends[i]``, the last one all of them.
        weights: ``(g,)``, of each prefix's squared error in the loss.
    """
    n, d = target.shape
    scales = weights * (2 / max(1, n))
    atoms = work.atoms(W_dec)
    errors, grads, squares = work.ops.prefixes.decode_prefixes(pattern, values, atoms, b_dec, target, ends, scales)
    loss = (squares.mean(0) if n else squares.sum(0)) @ weights
    flat = errors.reshape(-1, d)
    groups = torch.searchsorted(ends, torch.arange(pattern.n_features, device=ends.device), right=True)
    return Fit(
        loss,
        squares[:, -1],
        lambda: errors[:, -1] / -scales[-1],
        grads,
        work.rows(flat),
        flat.norm(dim=1),
        errors[:, 0].sum(0),
        groups,
    )


@dataclass
class Backward:
    """What an architecture adds on the way back from the code to the pre-activations.

    Attributes:
        grad: ``(nnz,)``, of the loss by the pre-activation at each entry.
        total: added to the squared errors.
        terms: for the log.
        dense: gradients of parameters other than encoder, decoder and their biases.
        encoder, decoder: what else belongs to their rows.
        b_enc: what else belongs to the encoder bias, ``(n_features,)``.
    """

    grad: Tensor
    total: Tensor | float = 0.0
    terms: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    encoder: Extra = field(default_factory=Extra)
    decoder: Extra = field(default_factory=Extra)
    b_enc: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One step half done: what the architecture's ``backward`` may look at.

    ``u``, ``values`` and ``grads`` are ``(nnz,)``: pre-activations, code values, and the gradient of the squared errors
    by the values. ``x`` is centred.
    """

    batch: TrainingBatch
    x: Tensor
    pattern: Pattern
    u: Tensor
    values: Tensor
    fit: Fit
    work: Workspace

    @property
    def grads(self) -> Tensor:
        return self.fit.grads


def closed_form(dictionary: LinearDictionary, batch: TrainingBatch, work: Workspace) -> tuple[Loss, Gradients] | None:
    """Loss and gradients of a batch; None where the code is so crowded that dense products are the better way."""
    rows = dictionary.check_width(batch.input)
    W_enc, b_dec = dictionary.W_enc.detach(), dictionary.b_dec.detach()
    centre = b_dec if dictionary.config.subtract_bias else None
    x, norms = work.centred(rows, centre)
    if not bool(torch.isfinite(norms.sum())):
        dictionary.check_finite(rows)
    n, ops, raw = len(x), work.ops, (rows, centre)
    pattern, u = work.select(dictionary.training_rule(), x, W_enc, dictionary.b_enc, norms, raw)
    if pattern.is_crowded and work.plan.backend != "reference":
        return None
    with serial(u):
        values = dictionary.activate(u, pattern)
    fit = dictionary.fit(pattern, values, batch.target, work)
    back = dictionary.backward(Step(batch, x, pattern, u, values, fit, work))
    columns = ops.csc.csc(pattern)
    grad_b_enc, grad_b_dec = ops.gradients.sum_over(columns, back.grad), fit.bias
    if dictionary.config.subtract_bias:
        grad_b_dec = grad_b_dec - ops.rows.weighted_sum(work.weights(W_enc), grad_b_enc)
    if back.b_enc is not None:
        grad_b_enc = grad_b_enc + back.b_enc
    factors = {
        "W_dec": Factors(fit.columns(columns, n), values, fit.errors, fit.lengths, back.decoder),
        "W_enc": Factors(columns, back.grad, work.rows(x), norms, back.encoder),
    }
    code = SparseCode.from_pattern(pattern, values)
    mse = fit.squares.mean() if n else fit.squares.sum()
    loss = Loss(fit.loss + back.total, {"mse": mse, **back.terms}, code, lambda: batch.target - fit.residual())
    return loss, Gradients(factors, {"b_enc": grad_b_enc, "b_dec": grad_b_dec, **back.dense})


def auxk_backward(
    dictionary: LinearDictionary, step: Step, k_aux: int, coefficient: float, *, signed: bool = False
) -> Backward:
    """The AuxK loss (see :func:`unweave.dictionaries._auxk.auxk_loss`) and its gradients, on the dead features alone.

    There are few of them and ``k_aux`` is large, so dense products on the gathered rows are the fast way.
    """
    with serial(step.u):
        out = Backward(step.grads if signed else step.grads * (step.u > 0))
    out.terms["auxk"] = step.x.new_zeros(())
    dead = step.batch.dead
    at = dead.nonzero().squeeze(1) if dead is not None else None
    if at is None or len(at) == 0 or coefficient == 0:
        return out
    product = step.work.product
    W_enc, b_enc, W_dec = (p.detach()[at] for p in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec))
    scores = product(step.x, W_enc.T) + b_enc
    if k_aux < len(at):
        strength = scores.abs() if signed else scores
        kth = strength.kthvalue(len(at) - k_aux + 1, dim=1, keepdim=True).values
        scores = scores.masked_fill(strength < kth, 0.0)
    values = scores if signed else F.relu(scores)
    residual = step.fit.residual()
    left = residual - product(values, W_dec)
    variance = (residual - residual.mean(0)).square().sum().clamp_min(1e-12)
    auxk = (left.square().sum() / variance).nan_to_num(0.0)
    grad = left * (-2 * coefficient / variance)  # of the loss by the auxiliary reconstruction
    grad_values = product(grad, W_dec.T).masked_fill_(values == 0, 0.0)
    place = torch.full((dictionary.n_features,), -1, dtype=torch.long, device=at.device)
    place[at] = torch.arange(len(at), device=at.device)
    out.decoder = Extra(place, product(values.T, grad))
    out.encoder = Extra(place, product(grad_values.T, step.x))
    out.b_enc = grad.new_zeros(dictionary.n_features).index_copy_(0, at, grad_values.sum(0))
    out.total, out.terms["auxk"] = coefficient * auxk, auxk
    return out
