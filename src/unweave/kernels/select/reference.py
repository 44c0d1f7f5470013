"""Exact selection rules on a dense ``(n, n_features)`` matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Exact


def topk(
    scores: Tensor, shift: Tensor | None, k: int, *, signed: bool = False, exact: Exact | None = None
) -> tuple[Pattern, Tensor]:
    """The ``k`` largest of ``scores + shift`` in each row, with their values."""
    u = _pre_activations(scores, shift, exact)
    pattern = select_topk(u.abs() if signed else u, k)
    return pattern, u.reshape(-1)[pattern.flat]


def batch_topk(
    scores: Tensor, shift: Tensor | None, n_keep: int, *, bound: float | None = None, exact: Exact | None = None
) -> tuple[Pattern, Tensor]:
    """The ``n_keep`` largest positive entries of ``scores + shift``, with their values."""
    u = _pre_activations(scores, shift, exact)
    pattern = select_batch_topk(u, n_keep / max(1, len(u)))
    return pattern, u.reshape(-1)[pattern.flat]


def above(
    scores: Tensor,
    shift: Tensor | None,
    threshold: Tensor | float,
    *,
    exact: Exact | None = None,
    expected: float = 64.0,
) -> tuple[Pattern, Tensor]:
    """Every entry of ``scores + shift`` above its threshold, with its value."""
    u = _pre_activations(scores, shift, exact)
    pattern = select_above(u, threshold)
    return pattern, u.reshape(-1)[pattern.flat]


def rounding_errors(A: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the rows of A, and of what they lost in the bfloat16 copy ``low``; both ``(n,)``."""
    A = A.double()
    return A.norm(dim=1), (A - low).norm(dim=1)


def _pre_activations(scores: Tensor, shift: Tensor | None, exact: Exact | None) -> Tensor:
    scores = scores if exact is None else exact.X @ exact.W.T
    return scores if shift is None else scores + shift


def select_topk(scores: Tensor, k: int) -> Pattern:
    """The ``k`` largest scores of each row, in no particular order."""
    n, n_features = scores.shape
    indices = scores.topk(min(k, n_features), dim=1, sorted=False).indices
    offsets = torch.arange(n + 1, device=scores.device) * indices.shape[1]
    return Pattern(offsets, indices.reshape(-1).int(), n_features)


def select_batch_topk(scores: Tensor, k: float) -> Pattern:
    """The ``n * k`` largest positive scores of the whole batch; rows get as many as they earn.

    Sorting all scores would cost more than the encoder, so a sample of rows guesses a bound that lets through
    somewhat more than enough; if it let through too few, all scores are taken. The result is exact either way.
    """
    n, n_features = scores.shape
    flat, n_keep = scores.reshape(-1), min(round(n * k), scores.numel())
    sample = scores[:: max(1, n // 32)].reshape(-1)
    n_sample = min(int(1.5 * n_keep * len(sample) / max(1, len(flat))) + 1, len(sample))
    if n_sample == 0:
        return _pattern_of_flat(flat.new_zeros(0, dtype=torch.long), n, n_features)
    bound = sample.topk(n_sample, sorted=False).values.min()
    entry = (flat >= bound).nonzero().squeeze(1)
    if len(entry) < n_keep:
        entry = torch.arange(len(flat), device=scores.device)
    best = flat[entry].topk(n_keep, sorted=False)
    return _pattern_of_flat(entry[best.indices[best.values > 0]].sort().values, n, n_features)


def select_above(scores: Tensor, threshold: Tensor | float) -> Pattern:
    """Every score above its threshold (a number or one per feature)."""
    n, n_features = scores.shape
    entry = (scores > threshold).reshape(-1).nonzero().squeeze(1)
    return _pattern_of_flat(entry, n, n_features)


def select_columns(scores: Tensor, budgets: Tensor) -> tuple[Pattern, Tensor]:
    """For each feature its ``budgets`` (``(n_features,)``) rows of the largest positive scores.

    Features of similar budgets are sorted together, so that a few large budgets do not make a long sort of all.

    Returns:
        The pattern, and ``(n_features,)`` the middle between each feature's smallest score kept and its largest left
        out, a score below zero counting as zero; -1 where the budget is zero.
    """
    n, n_features = scores.shape
    budgets = budgets.clamp(0, n)
    edges, kept = scores.new_full((n_features,), -1.0), []
    sizes = torch.frexp(budgets.double()).exponent
    for size in sizes[budgets > 0].unique().tolist():
        at = ((sizes == size) & (budgets > 0)).nonzero().squeeze(1)
        budget = budgets[at, None]
        most = min(int(budget.max()) + 1, n)
        best = scores[:, at].T.topk(most, dim=1)
        keep = (torch.arange(most, device=at.device) < budget) & (best.values > 0)
        kept.append((best.indices * n_features + at[:, None])[keep])
        values = torch.nn.functional.pad(best.values.clamp_min(0), (0, 1))  # the row after the last one: zero
        edges[at] = (values.gather(1, budget - 1) + values.gather(1, budget)).squeeze(1) / 2
    entry = torch.cat(kept).sort().values if kept else budgets.new_zeros(0)
    return _pattern_of_flat(entry, n, n_features), edges


def _pattern_of_flat(entry: Tensor, n: int, n_features: int) -> Pattern:
    rows = torch.div(entry, n_features, rounding_mode="floor")
    offsets = torch.zeros(n + 1, dtype=torch.long, device=entry.device)
    offsets[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    return Pattern(offsets, (entry - rows * n_features).int(), n_features)
