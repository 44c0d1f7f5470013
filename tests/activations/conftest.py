"""A source that stands in for a model: items of unequal length, rows left out, and a count of what it ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from unweave.batch import ActivationBatch, Items
from unweave.sources._base import Source


class FakeSource(Source):
    """``n_batches`` batches of 4 items with 3 to 20 tokens; two items make a document; the first token has no row.

    ``ran`` lists the batches the "model" was run for. ``before(i)``, when given, is called before batch ``i`` is made:
    tests raise or kill there. Batch 3 has no rows at all (a filter took them).
    """

    def __init__(
        self,
        n_batches: int = 12,
        d: int = 8,
        d_target: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        name: str = "fake",
        before: Callable[[int], None] | None = None,
        poison: tuple[int, int] | None = None,
    ) -> None:
        self.n_batches, self.d, self.d_target, self.dtype = n_batches, d, d_target, dtype
        self.name, self.before, self.poison = name, before, poison
        self.ran: list[int] = []

    @property
    def d_in(self) -> int:
        return self.d

    @property
    def d_out(self) -> int:
        return self.d_target or self.d

    @property
    def provenance(self) -> dict:
        return {"kind": "fake", "model": {"name": self.name, "revision": "r1"}, "site": "layers.2", "sizes": (3, 20)}

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        for i in range(skip, self.n_batches):
            if self.before:
                self.before(i)
            self.ran.append(i)
            yield self.batch(i)

    def batch(self, i: int) -> ActivationBatch:
        generator = torch.Generator().manual_seed(i)
        lengths = torch.randint(3, 21, (4,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        n_tokens = int(offsets[-1])
        number = torch.arange(4 * i, 4 * i + 4)
        items = Items(
            tokens=torch.randint(0, 1000, (n_tokens,), generator=generator, dtype=torch.int32),
            offsets=offsets,
            document=number // 2,
            start=((number % 2) * 20).int(),
        )
        keep = torch.ones(n_tokens, dtype=torch.bool)
        keep[offsets[:-1]] = False
        if i == 3:
            keep[:] = False
        row_token = keep.nonzero().flatten()
        rows = torch.randn(len(row_token), self.d, generator=generator).to(self.dtype)
        if self.poison and self.poison[0] == i:
            rows[self.poison[1], 0] = float("nan")
        target = rows
        if self.d_target:
            target = torch.randn(len(rows), self.d_target, generator=generator).to(self.dtype)
        return ActivationBatch(rows, target, items, row_token)


@pytest.fixture(scope="session")
def fake_source() -> type[FakeSource]:
    return FakeSource


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder, hidden ones too, by name."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def same_batch() -> Callable[[ActivationBatch, ActivationBatch], bool]:
    """Whether two batches are equal bit for bit, target ties included."""

    def same(a: ActivationBatch, b: ActivationBatch) -> bool:
        pairs = [
            (a.input, b.input),
            (a.target, b.target),
            (a.row_token, b.row_token),
            (a.items.tokens, b.items.tokens),
            (a.items.offsets, b.items.offsets),
            (a.items.document, b.items.document),
            (a.items.start, b.items.start),
        ]
        tied = (a.target is a.input) == (b.target is b.input)
        return tied and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)

    return same
