"""An architecture with its options, small enough that every check takes milliseconds."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unweave.activations import RowStream
from unweave.dictionaries import Dictionary, TrainingBatch, get
from unweave.errors import UnweaveError
from unweave.evaluation.synthetic import SyntheticSource
from unweave.sources.arrays import ArraySource
from unweave.training import TrainingConfig, train

K = 3.0  # features a row that an architecture is asked for, unless options say so
_STEPS, _BATCH, _RING, _POOL = 60, 64, 512, 4096


class Case:
    """An architecture under test.

    Rows are sums of 3 of 24 planted features, scaled to a mean square of 1 as in training.

    Args:
        arch: a class, a registered name or ``package.module:Class``.
        options: of its config, where the defaults do not fit such small shapes. What ``sparsity_option`` asks for
            3 features a row is added.
        d: width of the rows. n_features: size of the dictionary; no other dimension should have that size.

    Raises:
        UnweaveError: for an unknown architecture.
    """

    def __init__(
        self, arch: str | type[Dictionary], options: dict[str, Any] | None = None, *, d: int = 12, n_features: int = 40
    ) -> None:
        self.kind = arch if isinstance(arch, type) and "name" in vars(arch) else get(_path(arch))
        self.d, self.n_features = d, n_features
        self.options = {**self._sparsity(), **(options or {})}
        self._trained: Dictionary | Exception | None = None

    def _sparsity(self) -> dict[str, Any]:
        try:
            return self.kind.sparsity_option(K)
        except UnweaveError:
            return {}

    def __repr__(self) -> str:
        return f"Case({self.kind.name}, d={self.d}, n_features={self.n_features}, {self.options})"

    # ---- dictionaries -----------------------------------------------------------------------------------------

    def build(self, *, seed: int = 0, d_out: int | None = None, **options: Any) -> Dictionary:
        """A fresh dictionary, as its constructor leaves it."""
        config = self.kind.Config(
            d_in=self.d, d_out=d_out or self.d, n_features=self.n_features, **{**self.options, **options}
        )
        with seeded(seed):
            return self.kind(config)

    def started(self, seed: int = 0) -> Dictionary:
        """What :meth:`trained` was before its first step, in training mode."""
        dictionary, sample = self.build(seed=seed).train(), self.rows(_RING, torch.float32)
        with seeded(seed):
            dictionary.initialise(sample, sample)
        return dictionary

    def trained(self, dtype: torch.dtype = torch.float64) -> Dictionary:
        """A copy, in eval mode, of a dictionary trained for 60 steps."""
        if self._trained is None:
            try:
                self._trained = self.train(self.build(), self.stream(), self.training())
            except Exception as error:
                self._trained = error
        if isinstance(self._trained, Exception):
            raise self._trained
        return copy.deepcopy(self._trained).to(dtype).eval()

    def trained_on_target(self, d_out: int) -> Dictionary:
        """One whose target is not its input, after a few steps.

        Raises:
            UnweaveError: where the architecture has no use for such a target.
        """
        options = {"subtract_bias": False} if "subtract_bias" in self.kind.Config.model_fields else {}
        dictionary = self.build(d_out=d_out, **options)
        rows = self.rows(1024, torch.float32)
        target = rows @ torch.randn(self.d, d_out, generator=torch.Generator().manual_seed(5)) / self.d**0.5 + 0.3
        return self.train(
            dictionary, RowStream(ArraySource(rows, target, side=self.side(rows))), self.training(n_steps=20)
        ).double()

    @staticmethod
    def train(dictionary: Dictionary, *args: Any, **options: Any) -> Dictionary:
        """The dictionary that :func:`unweave.training.train` leaves."""
        return train(dictionary, *args, **options).dictionary

    # ---- rows -------------------------------------------------------------------------------------------------

    def rows(self, n: int = 48, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> Tensor:
        """``(n, d)``; another seed gives other rows."""
        first = (seed * 512) % (_POOL - n + 1)
        return _pool(self.d)[first : first + n].to(dtype, copy=True)

    def batch(self, n: int = 48, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> TrainingBatch:
        """Rows to train on, with every third feature counted as dead."""
        x = self.rows(n, dtype, seed=seed)
        return TrainingBatch(x, x, torch.arange(self.n_features) % 3 == 0, side=self.side(x))

    def side(self, x: Tensor) -> Tensor | None:
        """Side inputs for rows, where the architecture needs some."""
        return x.roll(1, dims=1) if self.kind.needs_side else None

    def stream(self) -> RowStream:
        rows = self.rows(2048, torch.float32)
        return RowStream(ArraySource(rows, side=self.side(rows)), seed=0)

    def training(self, *, n_steps: int = _STEPS, **options: Any) -> TrainingConfig:
        # Rows have the scale of training already, so that losses before and after it can be compared.
        fixed = {"batch_size": _BATCH, "ring_rows": _RING, "normalise_input": False, "checkpoint_every": 0}
        return TrainingConfig(n_rows=n_steps * _BATCH, **{**fixed, **options})


def _path(arch: str | type[Dictionary]) -> str:
    return arch if isinstance(arch, str) else f"{arch.__module__}:{arch.__qualname__}"


@cache
def _pool(d: int) -> Tensor:
    rows = SyntheticSource(d=d, n_features=24, l0=3.0, offset=0.4, noise=0.05).sample(_POOL).rows.double()
    return rows / rows.square().sum(1).mean().sqrt()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's generator seeded for a while; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
