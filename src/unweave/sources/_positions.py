"""A batch of contexts as a model wants it: right-padded tokens, and which positions count for what."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError


@dataclass(frozen=True)
class Contexts:
    """
    Attributes:
        tokens: ``(b, t)`` int64, padded on the right with 0.
        real: ``(b, t)`` boolean, false on padding.
        spliced: ``(b, t)`` boolean, the positions that gave rows in the source.
        predicts: ``(b, t)`` boolean, the positions whose next token counts for the loss: every real token but the
            first of each context is a target, unless it is one of the tokenizer's special tokens. So a BOS is never
            a target, the first token after it is.
        document: ``(b,)`` int64.
    """

    tokens: Tensor
    real: Tensor
    spliced: Tensor
    predicts: Tensor
    document: Tensor

    @classmethod
    def of(cls, batch: ActivationBatch, special_ids: Collection[int]) -> Contexts:
        items = batch.items
        if len(items.tokens) == 0 or int(items.tokens.min()) < 0:
            raise UnweaveError(
                "the loss of a language model needs rows that know their tokens; these were made from plain vectors. "
                "Evaluate on a TextSource, or leave the model out to get the reconstruction metrics alone."
            )
        lengths = items.offsets.diff()
        shape = (len(items), int(lengths.max()))
        item = items.item_of_token
        column = torch.arange(items.n_tokens) - items.offsets[item]
        tokens = torch.zeros(shape, dtype=torch.long)
        tokens[item, column] = items.tokens.long()
        real = torch.arange(shape[1]) < lengths[:, None]
        spliced = torch.zeros(shape, dtype=torch.bool)
        spliced[item[batch.row_token], column[batch.row_token]] = True
        predicts = torch.zeros(shape, dtype=torch.bool)
        special = torch.isin(tokens, torch.tensor(sorted(special_ids), dtype=torch.long))
        predicts[:, :-1] = (real & ~special)[:, 1:]
        return cls(tokens, real, spliced, predicts, items.document)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, items: slice) -> Contexts:
        parts = (self.tokens, self.real, self.spliced, self.predicts, self.document)
        return Contexts(*(part[items] for part in parts))

    def to(self, device: torch.device | str) -> Contexts:
        parts = (self.tokens, self.real, self.spliced, self.predicts, self.document)
        return Contexts(*(part.to(device) for part in parts))

    @property
    def n_targets(self) -> int:
        return int(self.predicts.sum())

    @property
    def targets(self) -> Tensor:
        """``(n_targets,)`` the next token at each predicting position, row-major."""
        return self.tokens.roll(-1, dims=1)[self.predicts]

    @property
    def target_document(self) -> Tensor:
        """``(n_targets,)`` the document of each."""
        return self.document[:, None].expand_as(self.tokens)[self.predicts]
