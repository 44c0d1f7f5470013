"""ITDA: the atoms are activations, picked greedily in one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._pursuit import MatchingDictionary, PursuitConfig, pursuit_ops
from unweave.dictionaries.registry import register
from unweave.errors import UnweaveError
from unweave.kernels.pattern import Pattern

_SAME = 1e-5  # 1 - |cosine| below which two rows are one atom, up to the rounding of stored activations


class ITDAConfig(PursuitConfig):
    """
    Attributes:
        n_features: the most atoms there will be; the dictionary grows until then.
        tau: a row becomes an atom where ``1 - cos(x, x_hat)`` exceeds this. The paper's threshold is a mean over
            coordinates, ``tau_paper = 2 tau / d``: its 4e-4 at d = 768 is the default here, which holds for any width.
        n_start: rows the dictionary starts with, whatever their error; d_in when None.
    """

    k: PositiveInt = 40
    tau: float = Field(0.1536, gt=0)
    n_start: PositiveInt | None = None

    @model_validator(mode="after")
    def _start_fits(self) -> ITDAConfig:
        if self.n_start is not None and self.n_start > self.n_features:
            raise ValueError(f"n_start must be at most n_features = {self.n_features}")
        return self


@register("itda")
class ITDA(MatchingDictionary):
    """k times: ``j = argmax |<r, d_j>|``, ``c = <r, d_j>``, ``z_j += c``, ``r -= c d_j``; atoms are rows ``x / ||x||``.

    Learnt without gradients: the first d different rows are atoms, the most frequent of a batch first, and then every
    row that is reconstructed badly, ``1 - cos(x, x_hat) > tau``, is made an atom. An atom thus says where it came from
    (``source``; a run keeps the text around it, as the feature's label), and two dictionaries built from the same rows,
    of different models even, are compared by the rows they chose (:func:`jaccard`).

    All rows of a batch are judged by the dictionary as it was before the batch; of rows that are equal up to rounding
    only the first is taken (our choice; the paper filters duplicates afterwards and does not say how). ``source`` holds
    the number of a row in the stream of training rows, counted from 0, which names the same row in two trainings with
    the same options. One pass is enough: rows that come again are known by then.
    """

    Config = ITDAConfig
    citation = "Leask, Nanda, Al Moubayed 2025, Inference-time decomposition of activations, ICML, arXiv:2505.17769"
    good_for = "a dictionary in seconds, of real rows that can be looked at; comparing models by what they share"
    learns_by_gradient = False
    atoms_are_rows = True

    source: Tensor
    size: Tensor
    n_rows_seen: Tensor

    def __init__(self, config: ITDAConfig) -> None:
        super().__init__(config)
        with torch.no_grad():
            self.W_dec.zero_()
        self.register_buffer("source", torch.full((config.n_features,), -1, dtype=torch.long))
        self.register_buffer("size", torch.tensor(0))
        self.register_buffer("n_rows_seen", torch.tensor(0))

    @property
    def sources(self) -> Tensor:
        """``(size,)`` the row each atom was."""
        return self.source[: int(self.size)]

    def match(self, rows: Tensor, trail: Tensor | None = None) -> tuple[Pattern, Tensor]:
        atoms = self.W_dec.detach()[: int(self.size)]
        pattern, values = pursuit_ops(atoms).matching_pursuit(rows, atoms, self.config.k, signed=True, trail=trail)
        return Pattern(pattern.offsets, pattern.indices, self.n_features), values

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        reconstruction = self.decode(code).detach()
        squares = (batch.input - reconstruction).square().sum(1)
        return Loss(squares.mean(), {"size": self.size.to(squares)}, code, reconstruction)

    @torch.no_grad()
    def absorb(self, batch: TrainingBatch) -> Loss:
        x, size = self.check_input(batch.input), int(self.size)
        missing = (self.config.n_start or min(self.d_in, self.n_features)) - size
        if missing > 0:
            self._add(x, self._frequent(x)[:missing])
        loss = self.loss(batch)
        if int(self.size) < self.n_features:
            assert isinstance(loss.reconstruction, Tensor)
            error = 1 - F.cosine_similarity(x, loss.reconstruction, dim=1, eps=torch.finfo(x.dtype).tiny)
            bad = ((error > self.config.tau) & (x.norm(dim=1) > 0)).nonzero().squeeze(1)
            self._add(x, bad[_first_of_its_kind(x[bad])])
        self.n_rows_seen += len(x)
        return loss

    def _frequent(self, x: Tensor) -> Tensor:
        """The rows of a batch that are no atoms yet, one of each kind, the most frequent first."""
        new = (x.norm(dim=1) > 0).nonzero().squeeze(1)
        known = F.normalize(x[new], dim=1) @ self.W_dec[: int(self.size)].T
        new = new[(known.abs() < 1 - _SAME).all(dim=1)]
        same = _same(x[new])
        first, counts = _first_of_its_kind(x[new]), same.sum(1)
        return new[first[counts[first].argsort(descending=True, stable=True)]]

    def _add(self, x: Tensor, rows: Tensor) -> None:
        size = int(self.size)
        rows = rows[: self.n_features - size]
        self.W_dec[size : size + len(rows)] = F.normalize(x[rows], dim=1)
        self.source[size : size + len(rows)] = self.n_rows_seen + rows
        self.size += len(rows)

    @torch.no_grad()
    def after_step(self, loss: Loss, progress: float) -> None:
        """Atoms are unit rows already."""


def _same(x: Tensor) -> Tensor:
    unit = F.normalize(x, dim=1)
    return (unit @ unit.T).abs() > 1 - _SAME


def _first_of_its_kind(x: Tensor) -> Tensor:
    """Of the rows on one line through the origin the first each."""
    return (~_same(x).tril(-1).any(dim=1)).nonzero().squeeze(1)


def jaccard(first: ITDA | Sequence[ITDA], second: ITDA | Sequence[ITDA]) -> float:
    """``|A and B| / |A or B|`` of the rows two dictionaries chose from the same data; nan where neither chose any.

    Unrelated activations do not score 0: the first batch is judged by hardly any atoms, and most of its rows are taken
    whatever they are. Compare scores with each other, and keep batches small beside the size of the dictionary.

    Args:
        first, second: a dictionary, or those of the layers of a model, whose rows are taken together.

    Raises:
        UnweaveError: where not all have seen as many rows: theirs are not numbers of rows of the same data.
    """
    groups = [list(one) if isinstance(one, Sequence) else [one] for one in (first, second)]
    seen = sorted({int(one.n_rows_seen) for group in groups for one in group})
    if len(seen) > 1:
        raise UnweaveError(
            f"jaccard: the dictionaries have seen different numbers of rows ({seen[0]:,} and {seen[-1]:,}), and only "
            "rows of the same data can be compared. Build all of them from the same stream."
        )
    a, b = ({row for one in group for row in one.sources.tolist()} for group in groups)
    return len(a & b) / len(a | b) if a | b else float("nan")
