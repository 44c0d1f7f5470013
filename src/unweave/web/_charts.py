"""Curves over training as inline SVG; the charts they share their axes with are the feature card's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from unweave.features.card.charts import BOTTOM, LEFT, RIGHT, TOP, linear_ticks, short_count, x_tick, y_tick
from unweave.features.card.formatting import number

WIDTH = 320
_MAX_POINTS = 240


def line_chart(points: Sequence[tuple[float, float]], *, name: str, unit: str = "rows", height: int = 170) -> Markup:
    """A curve over training. The y axis is logarithmic when the values span more than a factor of thirty.

    Returns an empty string for fewer than two finite points.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return Markup("")
    points = _thin(points)
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    log = lowest > 0 and highest / lowest > 30
    if not log and 0 < lowest < 0.4 * highest:
        lowest = 0.0  # show how far from nothing the curve ends
    ticks = log_ticks(lowest, highest) if log else linear_ticks(lowest, highest)
    low, high = min(lowest, ticks[0]), max(highest, ticks[-1])
    x0, x1 = points[0][0], points[-1][0]
    bottom = height - BOTTOM

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x0) / ((x1 - x0) or 1)

    def up(y: float) -> float:
        if log:
            y, a, b = math.log(y), math.log(low), math.log(high)
        else:
            a, b = low, high
        return bottom - (bottom - TOP) * (y - a) / ((b - a) or 1)

    placed = [(round(across(x), 1), round(up(y), 1)) for x, y in points]
    path = "M" + "L".join(f"{x} {y}" for x, y in placed)
    shown = [[px, py, short_count(x), number(y)] for (px, py), (x, y) in zip(placed, points)]
    summary = f"{name}: from {number(points[0][1])} to {number(points[-1][1])} over {short_count(x1)} {unit}"
    marks = "".join(y_tick(up(t), number(t), WIDTH) for t in ticks)
    marks += "".join(
        x_tick(across(t), bottom, short_count(t), end=across(t) > WIDTH - 40) for t in linear_ticks(x0, x1, 4)
    )
    return Markup(
        f'<svg class="chart line" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(summary)}" '
        f'data-points="{escape(json.dumps(shown))}" data-unit="{escape(unit)}">{marks}'
        f'<path class="curve" d="{path}"/><circle class="cursor" r="0"/></svg>'
    )


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 between when there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    inside = [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]
    return inside or [low, high]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most a few hundred points; the first and the last always stay."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    step = (len(points) - 1) / (_MAX_POINTS - 1)
    return [points[round(i * step)] for i in range(_MAX_POINTS)]
