"""Rows of a synthetic world, as many as are wanted, with their true codes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.evaluation.synthetic.config import SyntheticConfig
from unweave.evaluation.synthetic.world import World
from unweave.sources._base import Source

_BLOCK = 1024  # rows that one state of the generator makes


class Sample(NamedTuple):
    """Rows ``(n, d)`` and the code that made them."""

    rows: Tensor
    code: SparseCode


class SyntheticSource(Source):
    """A source of planted features: row ``i`` is the same whoever asks, and in whatever order.

    >>> source = SyntheticSource(d=32, n_features=64)
    >>> dictionary = unweave.fit(source, n_features=64, k=3, n_rows=200_000)      # doctest: +SKIP
    >>> recover(dictionary, source)                                               # doctest: +SKIP

    Args:
        config: the world; its defaults when None. options: fields of the config to change.
        n_rows: how many rows there are; None: there is no end.
        stream: another number gives other rows of the same world (see :meth:`held_out`).

    Raises:
        UnweaveError: for a config that does not fit together.
    """

    has_target = False

    def __init__(
        self,
        config: SyntheticConfig | None = None,
        *,
        n_rows: int | None = None,
        stream: int = 0,
        **options: Any,
    ) -> None:
        self.config = (config or SyntheticConfig()).replace(**options) if options or config is None else config
        if (n_rows is not None and n_rows < 1) or stream < 0:
            raise UnweaveError(f"SyntheticSource: expected n_rows >= 1 and stream >= 0, found {n_rows} and {stream}")
        self.n_rows, self.stream = n_rows, stream
        self.world = World(self.config)

    @property
    def d_in(self) -> int:
        return self.config.d

    @property
    def d_out(self) -> int:
        return self.config.d

    @property
    def directions(self) -> Tensor:
        """``(n_features, d)``, the unit vectors planted."""
        return self.world.directions

    @property
    def provenance(self) -> dict[str, Any]:
        data = {"name": "synthetic", "n_rows": self.n_rows, "stream": self.stream, **self.config.to_dict()}
        return {"kind": "synthetic", "dtype": "float32", "data": data}

    def __repr__(self) -> str:
        size = "endless" if self.n_rows is None else f"{self.n_rows:,} rows"
        c, l0 = self.config, float(self.world.rates.sum())
        return f"SyntheticSource({c.n_features:,} features in {c.d} dimensions, L0 {l0:.2f}, {size}, seed {c.seed})"

    def held_out(self, n_rows: int | None = None) -> SyntheticSource:
        """Rows of the same world that this source never gives."""
        return SyntheticSource(self.config, n_rows=n_rows, stream=self.stream + 1)

    def sample(self, n: int, first: int = 0) -> Sample:
        """Rows ``first`` to ``first + n`` and their true codes.

        Raises:
            UnweaveError: for rows beyond the last one.
        """
        if n < 1 or first < 0 or (self.n_rows is not None and first + n > self.n_rows):
            has = "no end" if self.n_rows is None else f"{self.n_rows:,} rows"
            raise UnweaveError(f"{self!r} has {has}: it cannot give {n:,} from row {first:,} on")
        blocks = [self._block(i) for i in range(first // _BLOCK, (first + n - 1) // _BLOCK + 1)]
        at = first % _BLOCK
        rows = torch.cat([block.rows for block in blocks])[at : at + n]
        return Sample(rows, SparseCode.concatenate([block.code for block in blocks])[at : at + n])

    def _block(self, number: int) -> Sample:
        words = np.random.SeedSequence([self.config.seed, self.stream, number]).generate_state(2, np.uint32)
        generator = torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        return Sample(*self.world.sample(_BLOCK, generator))

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        for number in count(skip):
            first = number * _BLOCK
            left = _BLOCK if self.n_rows is None else min(_BLOCK, self.n_rows - first)
            if left <= 0:
                return
            yield ActivationBatch.of_rows(self._block(number).rows[:left], None, first)
