"""HierarchicalTopK: one dictionary for every number of features a row, from 1 to k."""

from __future__ import annotations

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._closed_form import Fit
from unweave.dictionaries._linear import Errors
from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.errors import UnweaveError
from unweave.kernels.autograd import sparse_decode
from unweave.kernels.pattern import Pattern
from unweave.kernels.workspace import Workspace


class HierarchicalTopKConfig(TopKConfig):
    """
    Attributes:
        budgets: the numbers of features a row at which the reconstruction counts, rising, the last one k. None: every
            one from 1 to k. A training step holds ``(n, len(budgets), d_out)`` errors.
    """

    budgets: tuple[PositiveInt, ...] | None = None

    @model_validator(mode="after")
    def _budgets_fit(self) -> HierarchicalTopKConfig:
        given = self.budgets
        if given is not None and (list(given) != sorted(set(given)) or not given or given[-1] != self.k):
            raise ValueError(f"budgets must rise and end with k = {self.k}")
        return self


@register("hierarchical_topk")
class HierarchicalTopK(TopK):
    """TopK with the loss ``mean_j ||x - x_hat_j||^2 + AuxK / 32``, where ``x_hat_j`` takes the j largest values alone.

    So the code may be cut to any length afterwards (``encode_at``), and one dictionary serves where one for every k
    had to be trained.
    """

    Config = HierarchicalTopKConfig
    citation = (
        "Balagansky et al. 2025, Train one sparse autoencoder across multiple sparsity budgets, EMNLP, arXiv:2505.24473"
    )
    good_for = "one dictionary that serves many budgets, k chosen at inference"

    def encode_at(self, x: Tensor, k: int) -> SparseCode:
        """The codes of ``(n, d_in)`` rows cut to their ``k`` largest values."""
        if not 0 < k <= self.config.k:
            raise UnweaveError(f"{self.name}: expected k from 1 to the {self.config.k} it was trained for, found {k}")
        code = self.encode(x)
        values, order = ranked(code.values, len(code))
        return SparseCode.from_pattern(*ranks(code.pattern, values, order, 0, k))

    def errors(self, code: SparseCode, target: Tensor) -> Errors:
        values, order = ranked(code.values, len(target))
        difference, squares = self.b_dec - target, []
        for start, end in self._steps():
            pattern, part = ranks(code.pattern, values, order, start, end)
            difference = difference + sparse_decode(part, self.W_dec, pattern)
            squares.append(difference.square().sum(1).mean())
        return Errors(torch.stack(squares).mean(), squares[-1], target + difference)

    def fit(self, pattern: Pattern, values: Tensor, target: Tensor, work: Workspace) -> Fit:
        ops, W_dec, steps = work.ops, self.W_dec.detach(), self._steps()
        (n, d), g = target.shape, len(steps)
        sorted_values, order = ranked(values, n)
        parts = [ranks(pattern, sorted_values, order, start, end) for start, end in steps]
        differences = target.new_empty(n, g, d)
        difference = self.b_dec.detach() - target
        for number, (own, part) in enumerate(parts):
            difference = difference + ops.decode.decode(own, part, W_dec)
            differences[:, number] = difference
        squares = differences.square().sum(2)
        # What an atom of step g adds is in all reconstructions from there on.
        errors = (differences * (2 / max(1, n * g))).flip(1).cumsum(1).flip(1)
        grads = [
            ops.gradients.gather_dot(own, errors[:, number].contiguous(), W_dec).view(n, -1)
            for number, (own, _) in enumerate(parts)
        ]
        number = torch.arange(g, device=order.device)
        number = number.repeat_interleave(torch.tensor([end - start for start, end in steps], device=order.device))
        flat = errors.reshape(-1, d)
        return Fit(
            (squares.mean(0) if n else squares.sum(0)).mean(),
            squares[:, -1],
            lambda: -differences[:, -1],
            torch.empty_like(sorted_values).scatter_(1, order, torch.cat(grads, 1)).reshape(-1),
            flat,
            flat.norm(dim=1),
            errors[:, 0].sum(0),
            torch.empty_like(order).scatter_(1, order, number.expand_as(order)).reshape(-1),
            by_entry=True,
        )

    def _steps(self) -> list[tuple[int, int]]:
        """From which rank to which each budget adds to the one before."""
        ends = self.config.budgets or range(1, self.config.k + 1)
        return list(zip([0, *ends], ends))


def ranked(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``(n, k)`` values of a code of equal rows, largest first, and where in its row each of them was."""
    return values.view(n, len(values) // max(1, n)).sort(dim=1, descending=True, stable=True)


def ranks(pattern: Pattern, values: Tensor, order: Tensor, start: int, end: int) -> tuple[Pattern, Tensor]:
    """The entries of some ranks, from ``start`` up to before ``end``, with their values."""
    n, width = order.shape
    indices = pattern.indices.view(n, width).gather(1, order[:, start:end])
    offsets = torch.arange(n + 1, device=order.device) * indices.shape[1]
    return Pattern(offsets, indices.reshape(-1), pattern.n_features), values[:, start:end].reshape(-1)
