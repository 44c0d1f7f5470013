from __future__ import annotations

import numpy as np
import pytest

from unweave.features import _best
from unweave.features._best import BestPerFeature, Entries


@pytest.mark.parametrize("room", [0, 7, 1 << 19])
def test_equals_sorting_everything(room, monkeypatch):
    monkeypatch.setattr(_best, "_ROOM", room)
    rng = np.random.default_rng(0)
    n = 3000
    feature = rng.integers(0, 12, n).astype("i4")
    rank = rng.integers(0, 40, n).astype("u8")  # many ties, which the key breaks
    entries = Entries(feature, rank, rng.permutation(n).astype("i8"), np.arange(n), rng.random(n).astype("f4"))
    best = BestPerFeature(14, 5)
    for part in np.array_split(np.arange(n), 60):
        best.add(entries.take(part))
    kept = best.entries()
    for f in range(14):
        of = np.flatnonzero(feature == f)
        wanted = of[np.lexsort((entries.key[of], rank[of]))][:5]
        assert kept.token[kept.feature == f].tolist() == wanted.tolist()
    assert best.offsets().tolist() == [*(5 * i for i in range(13)), 60, 60]
