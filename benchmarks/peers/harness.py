"""Interleaved timing of several callables in one process: what a shared machine does to one, it does to all.

Every round calls each of them once, starting one further along each time. Reported are the median time over rounds,
the least, the interquartile range, and ratios formed within each round, of which the median is taken. A difference
below the spread is noise.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .machine import load

Call = Callable[[int], Any]  # gets the number of the round, from 0, warm-ups included


@dataclass
class Timing:
    """Times of one callable in seconds, a round each; ``error`` says why there are none."""

    name: str
    times: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def iqr(self) -> float:
        low, _, high = statistics.quantiles(self.times, n=4)
        return high - low

    def ratio(self, other: Timing) -> float:
        """How many times ``other``'s time this one takes: the median over rounds."""
        return statistics.median(a / b for a, b in zip(self.times, other.times, strict=True))


@dataclass
class Rounds:
    """What :func:`time_rounds` found."""

    timings: dict[str, Timing]
    load_before: list[float]
    load_after: list[float]

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    @property
    def working(self) -> list[Timing]:
        return [timing for timing in self.timings.values() if timing.error is None]

    def to_dict(self) -> dict[str, Any]:
        rows = {
            timing.name: {
                "median_ms": 1e3 * timing.median,
                "min_ms": 1e3 * min(timing.times),
                "iqr_ms": 1e3 * timing.iqr,
                "times_ms": [round(1e3 * t, 4) for t in timing.times],
            }
            if timing.error is None
            else {"error": timing.error}
            for timing in self.timings.values()
        }
        return {"load_before": self.load_before, "load_after": self.load_after, "timings": rows}


def time_rounds(
    calls: dict[str, Call], *, rounds: int = 7, warmups: int = 2, repeats: int = 1, say: bool = True
) -> Rounds:
    """Time callables side by side.

    Args:
        calls: name to callable. One that raises is reported with its message and left out of later rounds.
        rounds: timed rounds, at least 2. warmups: rounds before them. repeats: calls in a row, whose mean is taken.
    """
    timings = {name: Timing(name) for name in calls}
    before = load()
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(warmups + rounds):
            gc.collect()
            for name in names[number % len(names) :] + names[: number % len(names)]:
                timing = timings[name]
                if timing.error is not None:
                    continue
                start = time.perf_counter()
                try:
                    for _ in range(repeats):
                        calls[name](number)
                except Exception as error:
                    timing.error = message(error)
                    timing.times.clear()
                    continue
                if number >= warmups:
                    timing.times.append((time.perf_counter() - start) / repeats)
            if say:
                print(f"\r    round {number + 1}/{warmups + rounds} ", end="", flush=True)
    finally:
        if collecting:
            gc.enable()
    if say:
        print("\r" + " " * 24 + "\r", end="")
    return Rounds(timings, before, load())


def gemm_floor(rows: int, d: int, n_features: int) -> dict[str, Call]:
    """The encode's matrix product alone, into memory already there: in float32 as torch does it, and in bfloat16."""
    x, W = torch.randn(rows, d), torch.randn(n_features, d)
    out = torch.empty(rows, n_features)
    x16, W16, out16 = x.bfloat16(), W.bfloat16(), out.bfloat16()

    def product(a: Tensor, b: Tensor, into: Tensor) -> Call:
        return lambda number: torch.mm(a, b.T, out=into)

    return {"encode GEMM alone, float32": product(x, W, out), "encode GEMM alone, bfloat16": product(x16, W16, out16)}


def message(error: BaseException, limit: int = 220) -> str:
    """The first line of an error, cut short."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
