"""Intervals by resampling whole documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unweave.errors import UnweaveError
from unweave.evaluation import registry
from unweave.metrics import GroupedSums


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and the version of its definition. nan where it is not defined."""

    value: float
    low: float
    high: float
    version: int

    def __str__(self) -> str:
        return f"{self.shown} {self.interval}".rstrip()

    @property
    def shown(self) -> str:
        """The value, to as many digits as its interval warrants."""
        if np.isnan(self.value):
            return "-"
        return _digits(self.value, self.value if np.isnan(self.low) else self.high - self.low)

    @property
    def interval(self) -> str:
        """``[low, high]``, or nothing where there is none."""
        if np.isnan(self.value) or np.isnan(self.low):
            return ""
        width = self.high - self.low
        return f"[{_digits(self.low, width)}, {_digits(self.high, width)}]"


def estimate(sums: GroupedSums, n_bootstrap: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, Estimate]:
    """Each statistic of ``sums`` with its percentile bootstrap interval over groups of documents.

    Every resample draws as many documents as there are, with replacement, and works the statistic out anew from the
    resampled sums (a ratio is a ratio of sums). All statistics see the same resamples. With fewer than two documents,
    or ``n_bootstrap`` 0, there is no interval: ``low`` and ``high`` are nan.
    """
    if n_bootstrap < 0 or not 0 < level < 1:
        raise UnweaveError(f"expected n_bootstrap >= 0 and a level between 0 and 1, found {n_bootstrap} and {level}")
    values = sums.values()
    used = np.flatnonzero(sums.counts())
    if len(used) < 2 or n_bootstrap == 0:
        return {name: Estimate(value, np.nan, np.nan, _version(name)) for name, value in values.items()}
    weights = np.zeros((n_bootstrap, sums.groups.max_groups))
    rng = np.random.default_rng(seed)
    weights[:, used] = rng.multinomial(len(used), np.full(len(used), 1 / len(used)), size=n_bootstrap)
    result = {}
    for name, resampled in sums.statistics(weights).items():
        low, high = _interval(resampled, level)
        if (metric := registry.of(name)) is not None and metric.centre_interval:
            shift = values[name] - float(np.mean(resampled))
            low, high = max(low + shift, 0.0), min(high + shift, 1.0)
        result[name] = Estimate(values[name], low, high, _version(name))
    return result


def _interval(resampled: np.ndarray, level: float) -> tuple[float, float]:
    finite = resampled[np.isfinite(resampled)]
    if len(finite) == 0:
        return np.nan, np.nan
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _version(name: str) -> int:
    metric = registry.of(name)
    return 1 if metric is None else metric.version


def _digits(value: float, width: float) -> str:
    """As many decimals as the interval's width deserves."""
    if not np.isfinite(value):
        return "-"
    scale = width if width > 0 else max(abs(value), 1e-3)
    decimals = int(np.clip(1 - np.floor(np.log10(scale)), 0, 4))
    return f"{value:.{decimals}f}"
