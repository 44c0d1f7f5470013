"""The records every source yields: activation rows, and where each came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Items:
    """The pieces of text (contexts) a model saw whole, with all their tokens, also those that gave no row.

    Item ``i`` owns ``tokens[offsets[i]:offsets[i + 1]]``. For data without tokens (plain vectors, images) every
    item has one position and its token is -1.
    """

    tokens: Tensor  # (n_tokens,) int32
    offsets: Tensor  # (n_items + 1,) int64
    document: Tensor  # (n_items,) int64, the document each item was cut from
    start: Tensor  # (n_items,) int32, where in its document the item starts, in tokens

    def __len__(self) -> int:
        return len(self.document)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def item_of_token(self) -> Tensor:
        """``(n_tokens,)`` int64, the item of each token."""
        return torch.arange(len(self)).repeat_interleave(self.offsets.diff())

    @staticmethod
    def of_rows(n: int, first: int = 0) -> Items:
        """One item per row, for data without tokens; ``first`` numbers the first row's document."""
        return Items(
            tokens=torch.full((n,), -1, dtype=torch.int32),
            offsets=torch.arange(n + 1),
            document=torch.arange(first, first + n),
            start=torch.zeros(n, dtype=torch.int32),
        )

    @staticmethod
    def concatenate(parts: Sequence[Items]) -> Items:
        offsets, base = [torch.zeros(1, dtype=torch.long)], 0
        for part in parts:
            offsets.append(part.offsets[1:] + base)
            base += part.n_tokens
        return Items(
            torch.cat([p.tokens for p in parts]) if parts else torch.zeros(0, dtype=torch.int32),
            torch.cat(offsets),
            torch.cat([p.document for p in parts]) if parts else torch.zeros(0, dtype=torch.long),
            torch.cat([p.start for p in parts]) if parts else torch.zeros(0, dtype=torch.int32),
        )

    def __getitem__(self, items: slice) -> Items:
        first, stop, step = items.indices(len(self))
        assert step == 1, "items are sliced in runs"
        stop = max(first, stop)
        a, b = int(self.offsets[first]), int(self.offsets[stop])
        return Items(
            self.tokens[a:b],
            self.offsets[first : stop + 1] - a,
            self.document[first:stop],
            self.start[first:stop],
        )


@dataclass(frozen=True)
class Meta:
    """Where each of ``n`` rows came from."""

    document: Tensor  # (n,) int64
    position: Tensor  # (n,) int32, in the document, in tokens
    token: Tensor  # (n,) int32


@dataclass(frozen=True)
class ActivationBatch:
    """Activation rows and the items they came from: ``{input, target, meta}``, and where asked for ``side``.

    A batch holds whole items. ``row_token[i]`` says which token of ``items`` row ``i`` belongs to; tokens without a
    row were left out (padding never appears; BOS, special and high-norm tokens when the source says so).

    Attributes:
        input: ``(n, d_in)``.
        target: ``(n, d_out)``; the same tensor as ``input`` for an autoencoder.
        row_token: ``(n,)`` int64, rising.
        side: ``(n, d_side)``, what else a dictionary may be trained with (such as a gradient); None where there is
            nothing.
    """

    input: Tensor
    target: Tensor
    items: Items
    row_token: Tensor
    side: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return len(self.input)

    @cached_property
    def meta(self) -> Meta:
        item = self.items.item_of_token[self.row_token]
        position = self.items.start[item] + (self.row_token - self.items.offsets[item]).int()
        return Meta(self.items.document[item], position, self.items.tokens[self.row_token])

    @staticmethod
    def of_rows(
        rows: Tensor, target: Tensor | None = None, first: int = 0, side: Tensor | None = None
    ) -> ActivationBatch:
        """Rows without tokens, numbered from ``first``."""
        items = Items.of_rows(len(rows), first)
        return ActivationBatch(rows, rows if target is None else target, items, torch.arange(len(rows)), side)

    def of_items(self, first: int, stop: int) -> ActivationBatch:
        """Items ``first`` to ``stop`` with their rows, as views; a tied target stays tied."""
        ends = self.items.offsets[[first, stop]]
        rows = slice(*torch.searchsorted(self.row_token, ends).tolist())
        chosen = self.input[rows]
        target = chosen if self.target is self.input else self.target[rows]
        side = None if self.side is None else self.side[rows]
        return ActivationBatch(chosen, target, self.items[first:stop], self.row_token[rows] - ends[0], side)

    @staticmethod
    def concatenate(batches: Sequence[ActivationBatch]) -> ActivationBatch:
        """Several batches, at least one, as one; tied targets stay tied."""
        inputs = torch.cat([b.input for b in batches])
        tied = all(b.target is b.input for b in batches)
        target = inputs if tied else torch.cat([b.target for b in batches])
        tokens, base = [], 0
        for batch in batches:
            tokens.append(batch.row_token + base)
            base += batch.items.n_tokens
        sides = [b.side for b in batches if b.side is not None]
        side = torch.cat(sides) if len(sides) == len(batches) else None
        return ActivationBatch(inputs, target, Items.concatenate([b.items for b in batches]), torch.cat(tokens), side)

    def select(self, keep: Tensor) -> ActivationBatch:
        """Only the rows where the ``(n,)`` boolean mask is true; the items stay whole."""
        same = self.target is self.input
        chosen = self.input[keep]
        target, side = chosen if same else self.target[keep], None if self.side is None else self.side[keep]
        return ActivationBatch(chosen, target, self.items, self.row_token[keep], side)
