"""Several sources over the same text, joined row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.sources._base import Source
from unweave.sources.composite import parts_facts


class JoinedSource(Source):
    """The rows of several sources or stores over the same items, side by side: for comparing models, or sites.

    A row is there for every token that has one in all of them (each may have left out others, as of high norm). Its
    input is their inputs concatenated in the order given, and so are targets and side inputs, where they have any.

    Their batches must hold the same tokens in the same order: text sources over the same documents with the same
    tokenizer, ``context_size``, ``batch_tokens`` and ``bos`` do, and so do the stores harvested from them. The joined
    source ends with the shortest.

    Args:
        sources: two or more sources or :class:`~unweave.activations.ActivationStore`.

    Raises:
        UnweaveError: for fewer than two sources; where only some have side inputs; while iterating, at the first
            batch whose tokens are not the same in all.
    """

    def __init__(self, sources: Sequence[Any]) -> None:
        self.joined = list(sources)
        if len(self.joined) < 2:
            raise UnweaveError(f"JoinedSource: expected two sources or more, found {len(self.joined)}")
        if len({_d_side(source) is None for source in self.joined}) > 1:
            raise UnweaveError("JoinedSource: some of the sources have side inputs and some have none")

    @property
    def d_in(self) -> int:
        return sum(source.d_in for source in self.joined)

    @property
    def d_out(self) -> int:
        return sum(source.d_out or source.d_in for source in self.joined)

    @property
    def d_side(self) -> int | None:
        widths = [_d_side(source) for source in self.joined]
        return None if widths[0] is None else sum(width or 0 for width in widths)

    @cached_property
    def has_target(self) -> bool:
        """Whether targets are something other than the inputs; the first batch says it."""
        first = next(self.batches(), None)
        return first is not None and first.target is not first.input

    @property
    def provenance(self) -> dict[str, Any]:
        """Those of all; the model, data and split are said once where they are the same for all."""
        each = [dict(source.provenance) for source in self.joined]
        sites = [str(one.get("site") or one.get("kind") or "rows") for one in each]
        targets = [str(one.get("target_site") or site) for one, site in zip(each, sites)]
        shared = {
            key: each[0][key]
            for key in ("model", "data", "split")
            if key in each[0] and all(one.get(key) == each[0][key] for one in each)
        }
        facts: dict[str, Any] = {"kind": "joined", "site": "+".join(sites), "target_site": "+".join(targets)}
        facts["parts"] = parts_facts(sites, [source.d_in for source in self.joined])
        if targets != sites:
            facts["target_parts"] = parts_facts(targets, [source.d_out for source in self.joined])
        return {**facts, **shared, "sources": each}

    def __repr__(self) -> str:
        return f"JoinedSource({', '.join(map(repr, self.joined))})"

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        number = skip
        for batches in zip(*(source.batches(skip=skip) for source in self.joined)):
            yield _join(batches, number)
            number += 1


def _join(batches: Sequence[ActivationBatch], number: int) -> ActivationBatch:
    first = batches[0]
    for i, other in enumerate(batches[1:], 1):
        _check_same(first, other, number, i)
    common = reduce(_common, (batch.row_token for batch in batches))
    picked = [batch.select(torch.isin(batch.row_token, common)) for batch in batches]
    inputs = torch.cat([batch.input for batch in picked], dim=1)
    tied = all(batch.target is batch.input for batch in picked)
    target = inputs if tied else torch.cat([batch.target for batch in picked], dim=1)
    sides = [batch.side for batch in picked if batch.side is not None]
    return ActivationBatch(inputs, target, first.items, common, torch.cat(sides, dim=1) if sides else None)


def _common(a: Tensor, b: Tensor) -> Tensor:
    return a[torch.isin(a, b)]


def _check_same(first: ActivationBatch, other: ActivationBatch, number: int, i: int) -> None:
    ours, theirs = first.items, other.items
    if torch.equal(ours.offsets, theirs.offsets) and torch.equal(ours.tokens, theirs.tokens):
        return
    if len(ours) != len(theirs):
        found = f"{len(ours)} and {len(theirs)} items"
    else:
        at = next(k for k in range(len(ours)) if not torch.equal(ours[k : k + 1].tokens, theirs[k : k + 1].tokens))
        found = f"other tokens in item {at}"
    raise UnweaveError(
        f"JoinedSource: batch {number} of sources 0 and {i} is not over the same text: found {found}. Give both the "
        "same documents, tokenizer, context_size, batch_tokens and bos (and min_tokens, max_tokens, split)"
    )


def _d_side(source: Any) -> int | None:
    return getattr(source, "d_side", None)
