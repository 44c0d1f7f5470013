"""The rows an evaluation reads, and the other rows that means and baselines are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.progress import track


class EvaluationRows:
    """
    Attributes:
        batches: the evaluated batches, whole contexts. n_rows: their rows.
        fit: ``(m, d_out)`` target rows to fit on. fit_from: in words, where they came from.
    """

    def __init__(self, batches: list[ActivationBatch], fit: Tensor, fit_from: str) -> None:
        self.batches, self.fit, self.fit_from = batches, fit, fit_from
        self.n_rows = sum(batch.n_rows for batch in batches)

    @classmethod
    def read(cls, source: Any, fit: Any, n_rows: int, *, needs_fit: bool, progress: bool) -> EvaluationRows:
        """Read at most ``n_rows`` rows of ``source``, in whole contexts (at least one).

        Without ``fit``, the first rows of the source are set apart to fit on: as many as wanted, or, where the
        source is short, what ``n_rows`` leaves over, or a third of all rows if that is more.
        """
        if n_rows < 1:
            raise UnweaveError(f"evaluate: expected n_rows >= 1, found {n_rows}")
        d = source.d_out or source.d_in
        wanted = max(8192, 10 * d) if needs_fit else 0
        apart = wanted if fit is None else 0
        batches = _take(source, n_rows + apart, "evaluate: read rows", progress)
        total = sum(batch.n_rows for batch in batches)
        if total == 0:
            raise UnweaveError(
                "evaluate: the source gave no rows. Is the held-out split empty (too few documents), or were all "
                "tokens dropped as special or high-norm?"
            )
        first, batches = _split(batches, min(apart, max(total - n_rows, total // 3)))
        if not wanted:
            return cls(batches, batches[0].target[:0], "nothing")
        if fit is None:
            # One context cannot be shared out: then the rivals see the rows they are measured on, and it is said.
            words = "other rows of the same source" if first else "the evaluated rows themselves (there are so few)"
            rows = torch.cat([batch.target for batch in first or batches])
        elif isinstance(fit, Tensor):
            rows, words = fit[:wanted], "the rows given"
        else:
            taken = _take(fit, wanted, "evaluate: read rows to fit on", progress)
            rows = torch.cat([batch.target for batch in taken]) if taken else torch.zeros(0, d)
            words = "training rows"
        if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] != d:
            raise UnweaveError(f"evaluate: expected rows to fit on of shape (n, {d}), found {tuple(rows.shape)}")
        return cls(batches, rows.float(), words)


def cut(batch: ActivationBatch, n: int) -> tuple[ActivationBatch, ActivationBatch]:
    """The leading items of a batch that together hold at most ``n`` rows, and the other items."""
    items = batch.items
    before = torch.searchsorted(batch.row_token, items.offsets)  # rows in front of each item's end
    last = int((before <= n).nonzero()[-1])
    return batch.of_items(0, last), batch.of_items(last, len(items))


def _take(source: Any, n_rows: int, description: str, progress: bool) -> list[ActivationBatch]:
    taken: list[ActivationBatch] = []
    missing = n_rows
    with bar(n_rows, description, "rows", progress) as advance:
        for batch in source.batches():
            if batch.n_rows > missing:
                head, tail = cut(batch, missing)
                if head.n_rows == 0 and not taken:  # a first context longer than what was asked for
                    head, _ = cut(tail, int((tail.row_token < tail.items.offsets[1]).sum()))
                if head.n_rows:
                    taken.append(head)
                break
            taken.extend([batch] if batch.n_rows else [])
            missing -= batch.n_rows
            advance(batch.n_rows)
            if missing == 0:
                break
    return taken


def _split(batches: list[ActivationBatch], n: int) -> tuple[list[ActivationBatch], list[ActivationBatch]]:
    first: list[ActivationBatch] = []
    rest: list[ActivationBatch] = []
    for batch in batches:
        if n == 0:
            rest.append(batch)
            continue
        head, tail = cut(batch, n)
        first.extend([head] if head.n_rows else [])
        rest.extend([tail] if tail.n_rows else [])
        n = 0 if tail.n_rows else n - head.n_rows
    return first, rest


@contextmanager
def bar(total: int, description: str, unit: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Something to tell how many are done; silent when not ``shown``."""
    if not shown:
        yield lambda n: None
        return
    with track(total, description, unit) as progress:
        # Whole batches are worked off, so the last one may do more than was asked for.
        yield lambda n: progress.advance(min(n, total - progress.done))
