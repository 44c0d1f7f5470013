"""Cutting documents into contexts, and contexts into batches: the plan of a text source, without the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unweave.batch import Items
from unweave.sources.documents import Documents

Split = Literal["train", "held_out", "all"]

_HELD_OUT_ONE_IN = 20
_WINDOW = 1024  # contexts that are sorted by length together
_TOKENISED_TOGETHER = 64  # documents


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the held-out one in twenty.

    Decided by the text itself: a document that occurs twice is never on both sides, and the split stays the same
    under another order, limit or mix of data.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Context:
    """One sequence for the model: ``prefix`` (BOS or nothing) and a piece of a document."""

    tokens: np.ndarray  # (t,) int32
    document: int
    start: int  # where in the document the first element of ``tokens`` would stand


@dataclass(frozen=True)
class Plan:
    """Which contexts form which batch; the same however often it is asked.

    ``whole``: a document is one context, cut off at ``context_size``, instead of as many as it takes.
    """

    documents: Documents
    tokenize_many: Callable[[Sequence[str]], list[list[int]]]
    prefix: tuple[int, ...]
    context_size: int
    batch_tokens: int
    min_tokens: int
    max_tokens: int | None
    split: Split
    whole: bool = False

    def contexts(self) -> Iterator[Context]:
        """In document order. Pieces shorter than ``min_tokens`` are left out; stops before ``max_tokens`` is passed."""
        room = self.context_size - len(self.prefix)
        budget = self.max_tokens
        for number, ids in self._tokenised():
            for start in range(0, min(len(ids), room) if self.whole else len(ids), room):
                piece = ids[start : start + room]
                if len(piece) < self.min_tokens:
                    continue
                tokens = np.array([*self.prefix, *piece], dtype=np.int32)
                if budget is not None:
                    budget -= len(tokens)
                    if budget < 0:
                        return
                yield Context(tokens, number, start - len(self.prefix))

    def _tokenised(self) -> Iterator[tuple[int, list[int]]]:
        chosen = (
            (number, text)
            for number, text in enumerate(self.documents)
            if self.split == "all" or is_held_out(text) == (self.split == "held_out")
        )
        while group := list(islice(chosen, _TOKENISED_TOGETHER)):
            tokenised = self.tokenize_many([text for _, text in group])
            yield from ((number, ids) for (number, _), ids in zip(group, tokenised))

    def batches(self) -> Iterator[list[Context]]:
        """Contexts of about one length together, so there is little padding, in an order that hides the lengths.

        Within a window of a thousand contexts: shuffled (so that pieces of one document spread over batches),
        sorted by length, cut into batches of at most ``batch_tokens`` tokens with padding, batches shuffled.
        """
        contexts = self.contexts()
        for window_number in range(1 << 62):
            window = list(islice(contexts, _WINDOW))
            if not window:
                return
            rng = np.random.default_rng([self.documents.seed, window_number])
            window = [window[i] for i in rng.permutation(len(window))]
            window.sort(key=lambda context: -len(context.tokens))
            batches: list[list[Context]] = [[]]
            for context in window:
                if batches[-1] and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) > self.batch_tokens:
                    batches.append([])
                batches[-1].append(context)
            yield from (batches[i] for i in rng.permutation(len(batches)))


def to_items(contexts: Sequence[Context]) -> Items:
    """The contexts as the record of a batch."""
    offsets = np.concatenate([[0], np.cumsum([len(context.tokens) for context in contexts])])
    return Items(
        tokens=torch.from_numpy(np.concatenate([context.tokens for context in contexts])),
        offsets=torch.from_numpy(offsets.astype(np.int64)),
        document=torch.tensor([context.document for context in contexts], dtype=torch.int64),
        start=torch.tensor([context.start for context in contexts], dtype=torch.int32),
    )


def pad(items: Items) -> tuple[Tensor, Tensor]:
    """``(b, t)`` tokens padded on the right with 0, and their ``(b, t)`` boolean mask.

    ``padded[mask]`` is ``items.tokens`` again.
    """
    lengths = items.offsets.diff()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = items.tokens.long()
    return tokens, mask
