"""Where atoms come from: for a dictionary whose atoms are rows of its data, the text around each of these rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError

_SCORES = 1 << 24  # (rows, atoms) cosines at a time: 64 MB


@dataclass(frozen=True)
class AtomSource:
    """The first row of the data that an atom is.

    Attributes:
        feature: the atom. row: which row of the data, from 0. document, position, token: where the row came from.
        before, text, after: the tokens around it, as text (empty for data without tokens).
    """

    feature: int
    row: int
    document: int
    position: int
    token: int
    before: str = ""
    text: str = ""
    after: str = ""

    def __str__(self) -> str:
        return f"{self.feature}: {self.before}[{self.text}]{self.after}"


@torch.no_grad()
def atom_sources(
    dictionary: Dictionary,
    data: Any,
    *,
    token_strings: Callable[[Sequence[int]], Sequence[str]] | None = None,
    context: int = 12,
    tolerance: float = 1e-5,
    features: Sequence[int] | None = None,
) -> dict[int, AtomSource]:
    """The rows of the data that the atoms of a dictionary are, with the text they stand in, by feature.

    For ITDA this labels every atom (Leask et al. 2025, Inference-time decomposition of activations): its atoms are
    unit rows of the data. It works for any dictionary; atoms that are no row are left out. One pass over the data,
    which costs about as much as encoding it, and ends early once every atom is found.

    Args:
        data: what the dictionary was trained on: an ActivationStore or a source, anything with ``batches()``.
        token_strings: turns token ids into strings, such as ``LanguageModel.token_strings``; without it no text.
        context: tokens before and behind.
        tolerance: an atom is a row where one less their cosine is at most this.
        features: which atoms to look for; all that are not zero when None.

    Raises:
        UnweaveError: when the rows have another width than the atoms.
    """
    directions = dictionary.decoder_directions().float()
    if directions.shape[1] != data.d_in:
        raise UnweaveError(
            f"atom_sources: expected rows of width {directions.shape[1]}, as the atoms have, found {data.d_in}"
        )
    wanted = torch.arange(len(directions)) if features is None else torch.as_tensor(features)
    left = wanted[directions[wanted].norm(dim=1) > 0]
    found: dict[int, AtomSource] = {}
    n_before = 0
    for batch in data.batches():
        if len(left) == 0:
            break
        atoms = F.normalize(directions[left], dim=1)
        first = _first_rows(F.normalize(batch.input.float(), dim=1).to(atoms), atoms, tolerance)
        here = first >= 0
        for feature, row in zip(left[here].tolist(), first[here].tolist()):
            found[feature] = _described(feature, row, n_before, batch, token_strings, context)
        left = left[~here]
        n_before += batch.n_rows
    return {feature: found[feature] for feature in sorted(found)}


def _first_rows(rows: Tensor, atoms: Tensor, tolerance: float) -> Tensor:
    """``(m,)`` the first of the unit rows that each unit atom is, -1 where none is."""
    first = torch.full((len(atoms),), -1)
    step = max(1, _SCORES // max(1, len(atoms)))
    for lo in range(0, len(rows), step):
        same = rows[lo : lo + step] @ atoms.T >= 1 - tolerance
        hit = same.any(dim=0).cpu() & (first < 0)
        first[hit] = lo + same.int().argmax(dim=0).cpu()[hit]
    return first


def _described(
    feature: int, row: int, n_before: int, batch: ActivationBatch, token_strings: Any, context: int
) -> AtomSource:
    meta = batch.meta
    facts = (int(meta.document[row]), int(meta.position[row]), int(meta.token[row]))
    source = AtomSource(feature, n_before + row, *facts)
    if token_strings is None or source.token < 0:
        return source
    at = int(batch.row_token[row])
    item = int(batch.items.item_of_token[at])
    start, end = int(batch.items.offsets[item]), int(batch.items.offsets[item + 1])
    first, last = max(start, at - context), min(end, at + 1 + context)
    strings = token_strings(batch.items.tokens[first:last].tolist())  # together: tokens may share a character
    own = at - first
    pieces = ["".join(strings[some]) for some in (slice(own), slice(own, own + 1), slice(own + 1, None))]
    return AtomSource(feature, n_before + row, *facts, *pieces)
