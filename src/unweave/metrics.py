"""Measures of a reconstruction and of its codes: one definition each, used by training, evaluation and the browser.

Each measure has a version number in :data:`VERSIONS`, stored beside every number that is written to a file. Whoever
changes a definition raises its version, so that an old number is never taken for a new one.

Two accumulators stream over any number of rows: :class:`ReconstructionSums` and :class:`FiringSums`. Both keep their
sums apart by document (see :class:`Groups`), because rows of one document are not independent: an honest interval
resamples documents, not rows. Memory is bounded by the number of groups, not by the number of rows or documents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.codes import SparseCode
from unweave.errors import UnweaveError

VERSIONS: dict[str, int] = {
    "fvu": 1,
    "cosine": 1,
    "l2_ratio": 1,
    "relative_bias": 1,
    "l0": 1,
    "density": 1,
    "dead_share": 1,
    "dense_share": 1,
}

#: A feature that fires in more than this share of rows counts as dense.
DENSE = 0.1

_CHUNK = 1 << 17  # entries turned to float64 at a time: 1 MB stays in cache; a whole batch took four times as long
_ZERO_VARIANCE = 1e-24  # relative to the mean square: far above float64 rounding, far below any float32 variation


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """Fraction of variance unexplained: ``sum ||x - x_hat||^2 / sum ||x - mean||^2``, one minus explained variance.

    Sums run over all rows and dimensions, the mean over the same rows. The identity scores exactly 0, the mean
    predictor exactly 1, and anything worse than the mean more than 1.

    Args:
        x: ``(n, d)``. x_hat: ``(n, d)``.

    Returns:
        nan where the rows do not vary (then there is no variance to explain).
    """
    return _once(x, x_hat)["fvu"]


def cosine(x: Tensor, x_hat: Tensor) -> float:
    """Mean over rows of the cosine between ``x`` and ``x_hat``; a zero row scores 1 against zero, else 0."""
    return _once(x, x_hat)["cosine"]


def l2_ratio(x: Tensor, x_hat: Tensor) -> float:
    """Mean over rows with ``||x|| > 0`` of ``||x_hat|| / ||x||``: below 1 where the dictionary shrinks."""
    return _once(x, x_hat)["l2_ratio"]


def relative_bias(x: Tensor, x_hat: Tensor) -> float:
    """``sum ||x_hat||^2 / sum <x, x_hat>``: 1 where no scaling of the output would fit better, below 1: shrinkage.

    Rajamanoharan et al. 2024 (gated SAEs), equation 10.
    """
    return _once(x, x_hat)["relative_bias"]


def l0(code: SparseCode) -> float:
    """Mean number of features that fire (value not zero) in a row; nan for no rows."""
    return float(code.l0().double().mean()) if len(code) else float("nan")


def density(code: SparseCode) -> Tensor:
    """``(n_features,)`` float64: the share of rows in which each feature fires; nan for no rows."""
    return code.firing_counts().double() / len(code) if len(code) else torch.full((code.n_features,), torch.nan)


def dead_share(density: Tensor) -> float:
    """Share of features that never fired in the rows the densities were measured on."""
    return float((density == 0).double().mean())


def dense_share(density: Tensor) -> float:
    """Share of features that fired in more than :data:`DENSE` of the rows."""
    return float((density > DENSE).double().mean())


def _once(x: Tensor, x_hat: Tensor) -> dict[str, float]:
    sums = ReconstructionSums(x.shape[-1])
    sums.add(x, x_hat)
    return sums.values()


class Groups:
    """Documents numbered in the order they appear, folded round robin into at most ``max_groups`` groups.

    Up to ``max_groups`` documents, every document is a group of its own. Beyond, a group is a set of whole documents;
    such sets are as independent as documents are, so resampling groups is still valid, with bounded memory.
    """

    def __init__(self, max_groups: int = 1024) -> None:
        if max_groups < 1:
            raise UnweaveError(f"Groups: expected max_groups >= 1, found {max_groups}")
        self.max_groups = max_groups
        self._number: dict[int, int] = {}

    @property
    def n_documents(self) -> int:
        return len(self._number)

    def __call__(self, documents: Tensor) -> Tensor:
        """``(n,)`` document numbers to ``(n,)`` int64 group numbers; unseen documents get the next numbers."""
        ids, inverse = documents.cpu().unique(return_inverse=True)
        first = torch.full((len(ids),), len(documents), dtype=torch.long)
        first.scatter_reduce_(0, inverse, torch.arange(len(documents)), "amin")
        numbers = torch.empty(len(ids), dtype=torch.long)
        for at in first.argsort().tolist():
            numbers[at] = self._number.setdefault(int(ids[at]), len(self._number))
        return (numbers % self.max_groups)[inverse]


class GroupedSums:
    """Sums kept apart by group of documents, and the statistics that are functions of them.

    A statistic is worked out from *weighted* sums, ``weights @ sums``: all ones give the point estimate, multinomial
    counts a bootstrap resample, and a ratio is always formed after summing.
    """

    def __init__(self, groups: Groups | None) -> None:
        self.groups = groups or Groups(1)

    def counts(self) -> np.ndarray:
        """``(max_groups,)`` float64, how many observations each group holds."""
        raise NotImplementedError

    def statistics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every statistic for each of ``(b, max_groups)`` weightings, each ``(b,)``."""
        raise NotImplementedError

    def values(self) -> dict[str, float]:
        """The point estimates."""
        ones = np.ones((1, self.groups.max_groups))
        return {name: float(value[0]) for name, value in self.statistics(ones).items()}

    def _group(self, n: int, document: Tensor | None) -> Tensor:
        if document is None:
            return torch.zeros(n, dtype=torch.long)
        if len(document) != n:
            raise UnweaveError(f"expected one document number per row ({n}), found {len(document)}")
        return self.groups(document)


class ReconstructionSums(GroupedSums):
    """Streaming fvu, cosine, l2_ratio and relative_bias over pairs of rows, in float64.

    Without ``groups`` all rows form one group, which is all that training needs for its log.

    >>> sums = ReconstructionSums(d=2)
    >>> sums.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> sums.values()["fvu"]
    0.0
    """

    _columns = ("n", "square", "error", "cosine", "square_hat", "dot", "ratio", "n_ratio")

    def __init__(self, d: int, groups: Groups | None = None) -> None:
        super().__init__(groups)
        self.d = d
        self._table: Any = None  # (max_groups, len(_columns)) float64, where the rows are
        self._vector: Any = None  # (max_groups, d) float64, sum of x - shift
        self._shift: Any = None

    def add(self, x: Tensor, x_hat: Tensor, document: Tensor | None = None) -> None:
        """Add ``(n, d)`` rows and their reconstructions; ``document`` ``(n,)`` says which rows belong together."""
        if x.ndim != 2 or x.shape[1] != self.d or x.shape != x_hat.shape:
            raise UnweaveError(
                f"expected rows and reconstructions of equal shape (n, {self.d}), found {tuple(x.shape)} and "
                f"{tuple(x_hat.shape)}"
            )
        if len(x) == 0:
            return
        x, x_hat = _with_float64(x.detach()), _with_float64(x_hat.detach().to(x.device))
        if self._shift is None:
            # Sums are taken of x - shift: with a large mean, E||x||^2 - ||E x||^2 would lose all digits.
            self._shift = x.mean(0, dtype=torch.float64)
            new = {"dtype": torch.float64, "device": x.device}
            self._table = torch.zeros(self.groups.max_groups, len(self._columns), **new)
            self._vector = torch.zeros(self.groups.max_groups, self.d, **new)
        group = self._group(len(x), document).to(x.device)
        step = max(1, _CHUNK // self.d)
        for i in range(0, len(x), step):
            self._add(x[i : i + step].double(), x_hat[i : i + step].double(), group[i : i + step])

    def _add(self, x: Tensor, x_hat: Tensor, group: Tensor) -> None:
        centred = x - self._shift
        xx, yy, xy = x.square().sum(1), x_hat.square().sum(1), (x * x_hat).sum(1)
        both = xx * yy
        both_zero = ((xx == 0) & (yy == 0)).double()
        rows = [
            torch.ones_like(xx),
            centred.square().sum(1),
            (x - x_hat).square().sum(1),
            torch.where(both > 0, xy / both.sqrt(), both_zero),
            yy,
            xy,
            torch.where(xx > 0, (yy / xx).sqrt(), 0.0),
            (xx > 0).double(),
        ]
        if self.groups.max_groups == 1:
            self._table += torch.stack([row.sum() for row in rows])
            self._vector += centred.sum(0)
        else:
            self._table.index_add_(0, group, torch.stack(rows, 1))
            self._vector.index_add_(0, group, centred)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far (of an accumulator without groups), for a checkpoint; empty before the first rows."""
        if self._table is None:
            return {}
        return {"table": self._table, "vector": self._vector, "shift": self._shift}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._table, self._vector, self._shift = (state.get(name) for name in ("table", "vector", "shift"))

    def counts(self) -> np.ndarray:
        return np.zeros(self.groups.max_groups) if self._table is None else self._table[:, 0].cpu().numpy()

    def statistics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        if self._table is None:
            return {name: np.full(len(weights), np.nan) for name in ("fvu", "cosine", "l2_ratio", "relative_bias")}
        totals = dict(zip(self._columns, (weights @ self._table.cpu().numpy()).T))
        vector = weights @ self._vector.cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = totals["square"] - (vector**2).sum(1) / totals["n"]
            scale = totals["square"] + totals["n"] * float(self._shift.square().sum())
            variance = np.where(variance > _ZERO_VARIANCE * scale, variance, np.nan)
            return {
                "fvu": totals["error"] / variance,
                "cosine": totals["cosine"] / totals["n"],
                "l2_ratio": totals["ratio"] / totals["n_ratio"],
                "relative_bias": totals["square_hat"] / np.where(totals["dot"] == 0, np.nan, totals["dot"]),
            }


class FiringSums(GroupedSums):
    """Streaming l0, dead_share and dense_share over codes. Memory: ``max_groups * n_features`` 32-bit counts."""

    def __init__(self, n_features: int, groups: Groups | None = None) -> None:
        super().__init__(groups)
        self.n_features = n_features
        self._n = torch.zeros(self.groups.max_groups, dtype=torch.float64)
        self._fired = torch.zeros(self.groups.max_groups * n_features, dtype=torch.int32)

    def add(self, code: SparseCode, document: Tensor | None = None) -> None:
        """Add the codes of ``n`` rows; ``document`` ``(n,)`` says which rows belong together."""
        if code.n_features != self.n_features:
            raise UnweaveError(f"expected codes of {self.n_features} features, found {code.n_features}")
        group = self._group(len(code), document)
        self._n.index_add_(0, group, torch.ones(len(code), dtype=torch.float64))
        code = code.detach().nonzero().to("cpu")
        flat = group[code.rows] * self.n_features + code.indices.long()
        self._fired.index_add_(0, flat, torch.ones(len(flat), dtype=torch.int32))

    @property
    def density(self) -> Tensor:
        """``(n_features,)`` float64: the share of all rows in which each feature fires."""
        return self._fired.view(-1, self.n_features).sum(0, dtype=torch.float64) / self._n.sum()

    def counts(self) -> np.ndarray:
        return self._n.numpy()

    def statistics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        counts = self._fired.view(-1, self.n_features)
        used = self._n > 0
        counts, n_rows = counts[used].float(), self._n[used]
        chosen = torch.from_numpy(np.asarray(weights, dtype=np.float64))[:, used]
        parts: dict[str, list[Tensor]] = {"l0": [], "dead_share": [], "dense_share": []}
        step = max(1, _CHUNK // self.n_features)
        for i in range(0, len(chosen), step):
            block = chosen[i : i + step]
            # float32 holds the counts exactly up to 16.8 million rows; liveness needs only "is it zero".
            fired, n = block.float() @ counts, block @ n_rows
            parts["l0"].append(fired.sum(1, dtype=torch.float64) / n)
            parts["dead_share"].append((fired == 0).double().mean(1))
            parts["dense_share"].append((fired / n[:, None] > DENSE).double().mean(1))
        return {name: torch.cat(values).numpy() for name, values in parts.items()}


def _with_float64(x: Tensor) -> Tensor:
    return x.cpu() if x.device.type == "mps" else x  # that device has no float64
