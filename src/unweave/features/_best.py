"""Keep, for every feature, the few best of many entries: exact, in bounded memory, whatever order they come in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_ROOM = 1 << 19  # entries that may wait before the kept ones are worked out again
_WORST = np.uint64(2**64 - 1)


class Entries(NamedTuple):
    """Columns of equal length, one row per entry."""

    feature: np.ndarray  # int32
    rank: np.ndarray  # uint64, small is good
    key: np.ndarray  # int64, where the entry is: breaks ties of rank
    token: np.ndarray  # int64, its token in the store
    value: np.ndarray  # float32

    @staticmethod
    def empty() -> Entries:
        return Entries(*(np.zeros(0, dtype) for dtype in ("i4", "u8", "i8", "i8", "f4")))

    def take(self, which: np.ndarray) -> Entries:
        return Entries(*(column[which] for column in self))


class BestPerFeature:
    """For each feature the ``n`` entries of smallest ``(rank, key)``.

    New entries wait until they are as many as the kept ones; then both are sorted together and cut. So memory is
    ``O(n_features * n)`` and each entry that still has a chance is sorted a few times at most; the others are
    dropped at once, because every feature's worst kept rank is known.

    Args:
        n_features: number of features. n: entries kept of each.
    """

    def __init__(self, n_features: int, n: int) -> None:
        self.n_features, self.n = n_features, n
        self._kept = Entries.empty()
        self._waiting: list[Entries] = []
        self._n_waiting = 0
        self._limit = np.full(n_features, _WORST)

    def add(self, entries: Entries) -> None:
        hopeful = np.flatnonzero(entries.rank <= self._limit[entries.feature])
        if len(hopeful) == 0:
            return
        self._waiting.append(entries.take(hopeful))
        self._n_waiting += len(hopeful)
        if self._n_waiting > max(_ROOM, len(self._kept.rank)):
            self._settle()

    def entries(self) -> Entries:
        """The kept entries, by feature, best first."""
        self._settle()
        return self._kept

    def offsets(self) -> np.ndarray:
        """``(n_features + 1,)`` where each feature's entries start."""
        counts = np.bincount(self.entries().feature, minlength=self.n_features)
        return np.concatenate([[0], counts.cumsum()]).astype("i8")

    def _settle(self) -> None:
        if not self._waiting:
            return
        parts = [self._kept, *self._waiting]
        every = Entries(*(np.concatenate(columns) for columns in zip(*parts)))
        self._waiting, self._n_waiting = [], 0
        every = every.take(np.lexsort((every.key, every.rank, every.feature)))
        counts = np.bincount(every.feature, minlength=self.n_features)
        starts = counts.cumsum() - counts
        place = np.arange(len(every.rank)) - starts[every.feature]
        self._kept = every.take(np.flatnonzero(place < self.n))
        full = counts >= self.n
        self._limit[full] = every.rank[starts[full] + self.n - 1]
