"""A dictionary whose codes are given, and stores built from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from unweave.batch import ActivationBatch, Items
from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary, DictionaryConfig
from unweave.features import FeatureStore, IndexConfig, build_features


class Planted(Dictionary):
    """Input row ``[i]`` has the code ``dense[i]``."""

    name = "planted"
    Config = DictionaryConfig

    def __init__(self, dense: Tensor, directions: Tensor | None = None) -> None:
        super().__init__(DictionaryConfig(d_in=1, d_out=4, n_features=dense.shape[1]))
        generator = torch.Generator().manual_seed(0)
        self.atoms = nn.Parameter(torch.randn(dense.shape[1], 4, generator=generator))
        if directions is not None:
            self.atoms = nn.Parameter(directions)
        self.dense = dense

    def encode(self, x: Tensor) -> SparseCode:
        return SparseCode.from_dense(self.dense[x[:, 0].long()])

    def decoder_directions(self) -> Tensor:
        return self.atoms


def item_batch(items: Sequence[tuple[int, int, Sequence[int], Sequence[int]]]) -> ActivationBatch:
    """A batch of items given as ``(document, start, token ids, row numbers)``; row number -1: a token without row."""
    tokens = [t for _, _, ids, _ in items for t in ids]
    rows = [r for *_, numbers in items for r in numbers]
    lengths = torch.tensor([0, *(len(ids) for _, _, ids, _ in items)])
    made = Items(
        torch.tensor(tokens, dtype=torch.int32),
        lengths.cumsum(0),
        torch.tensor([d for d, *_ in items]),
        torch.tensor([s for _, s, *_ in items], dtype=torch.int32),
    )
    row_token = torch.tensor([i for i, r in enumerate(rows) if r >= 0], dtype=torch.long)
    x = torch.tensor([[float(r)] for r in rows if r >= 0]).reshape(-1, 1)
    return ActivationBatch(x, x, made, row_token)


@pytest.fixture(scope="session")
def planted() -> SimpleNamespace:
    """The tools above: ``planted.dictionary(dense)``, ``planted.batch(items)``."""
    return SimpleNamespace(dictionary=Planted, batch=item_batch)


VOCABULARY = [b"the", b" cat", b" sat", b" on", b" mat", b".", b" Dog", b"\n"]


@pytest.fixture
def hand_made(tmp_path: Path) -> FeatureStore:
    """Three items with hand-computed answers; see the tests.

    item 0, document 5, from its start:   the cat sat on the mat .     (the first token has no row)
    item 1, document 5, from position 7:  the Dog sat
    item 2, document 9, from its start:   cat cat cat cat
    Feature 0 fires on " cat", feature 1 on "sat" (negatively), feature 2 on every row, feature 3 never.
    """
    ids = [[0, 1, 2, 3, 0, 4, 5], [0, 6, 2], [1, 1, 1, 1]]
    dense = torch.zeros(13, 4)
    dense[0, 0], dense[9:13, 0] = 2.0, torch.tensor([1.0, 5.0, 5.0, 3.0])
    dense[1, 1], dense[8, 1] = -4.0, -1.5
    dense[:, 2] = 0.25
    items = [(5, 0, ids[0], [-1, 0, 1, 2, 3, 4, 5]), (5, 7, ids[1], [6, 7, 8]), (9, 0, ids[2], [9, 10, 11, 12])]
    directions = torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [0, 0, 2.0, 0], [-1.0, 0, 0, 0]])
    output = torch.zeros(4, 8)
    output[0] = torch.tensor([0.0, 3, 1, 0, 0, 0, -2, -1])
    return build_features(
        tmp_path / "features",
        Planted(dense, directions),
        [item_batch(items[:2]), item_batch(items[2:])],
        token_bytes=VOCABULARY,
        unembed=lambda d: d @ output,
        config=IndexConfig(n_logits=2, before=3, after=2),
    )


@pytest.fixture(scope="session")
def random_case() -> SimpleNamespace:
    """Random codes over 60 items of unequal length: some features dense, some dead, values coarse so that they tie."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (60,), generator=generator).tolist()
    items, row = [], 0
    for i, n in enumerate(lengths):
        ids = torch.randint(0, 50, (n,), generator=generator).tolist()
        rows = [-1 if (i + j) % 7 == 0 else row + j for j in range(n)]
        items.append((i // 3, 20 * (i % 3), ids, rows))
        row += n
    density = torch.tensor([0.9, 0.5, 0.3, 0.1, 0.05, 0.02, 0.01, 0.0, 0.3, 0.3])
    fires = torch.rand(row, 10, generator=generator) < density
    dense = torch.randint(1, 9, (row, 10), generator=generator) * 0.37 * fires
    dense[:, 8] *= -1
    dense[:, 9] *= torch.randn(row, generator=generator).exp() * torch.where(torch.rand(row) < 0.5, -1.0, 1.0)
    used = torch.tensor([r for *_, rows in items for r in rows if r >= 0])
    return SimpleNamespace(items=items, dense=dense, dictionary=Planted(dense), rows=dense[used])


@pytest.fixture(scope="session")
def content() -> Callable[[FeatureStore], list[tuple]]:
    """Everything a store says about its features, free of where its items lie."""

    def of(store: FeatureStore) -> list[tuple]:
        def where(context):
            return context.document, context.position, context.value, tuple(context.tokens), tuple(context.values)

        return [
            (
                (f.n_firing, f.n_items, f.n_negative, f.max_value, f.density),
                [array.tolist() for array in f.histogram],
                [where(c) for c in f.top],
                [(q.low, q.high, [where(c) for c in q.contexts]) for q in f.quantiles],
                f.top_tokens,
                f.cofiring,
                f.similar,
                f.positive_logits,
            )
            for f in store
        ]

    return of
