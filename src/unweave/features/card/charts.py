"""A feature's charts as inline SVG, drawn in Python. Colours and fonts come from the page's style sheet.

Everything is drawn in a box of fixed units that scales with the page, so one chart serves desktop, phone and paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup, escape

from unweave.features.card.formatting import number

LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 24  # what the axes need around a chart


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    name: str,
    what: str,
    width: int = 360,
    height: int = 150,
    edge_text: Callable[[float], str] = number,
    tick_at: Sequence[float] | None = None,
    tick_text: Callable[[float], str] | None = None,
    links: Sequence[str] | None = None,
) -> Markup:
    """Bars of ``counts`` (b,) between ``edges`` (b + 1,). Heights are linear; a bar that is not empty is visible.

    Args:
        what: what is counted, for the hover text ("features"). links: an address for each bar.
        width: of the box; about the pixels the chart gets, so that its text has the page's size.
    """
    counts = [float(c) for c in counts]
    edges = [float(e) for e in edges]
    if not counts or sum(counts) == 0 or len(edges) != len(counts) + 1:
        return Markup("")
    bottom, peak = height - BOTTOM, max(counts)
    first, last = edges[0], edges[-1]

    def across(x: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * (x - first) / ((last - first) or 1)

    bars = []
    for i, count in enumerate(counts):
        if not count:
            continue
        a, b = across(edges[i]), across(edges[i + 1])
        tall = max(1.0, (bottom - TOP) * count / peak)
        tip = escape(f"{edge_text(edges[i])} to {edge_text(edges[i + 1])}: {count:,.0f} {what}")
        bar = (
            f'<rect class="bar" x="{a:.1f}" y="{bottom - tall:.1f}" width="{max(b - a - 0.8, 0.6):.1f}" '
            f'height="{tall:.1f}" data-tip="{tip}"/>'
        )
        if links:
            bar = f'<a href="{escape(links[i])}" aria-label="{tip}">{bar}</a>'
        bars.append(bar)
    ticks = linear_ticks(first, last, 5) if tick_at is None else tick_at
    marks = "".join(
        x_tick(across(t), bottom, (tick_text or edge_text)(t), end=across(t) > width - 30)
        for t in ticks
        if first <= t <= last
    )
    marks += "".join(
        y_tick(bottom - (bottom - TOP) * t / peak, short_count(t), width)
        for t in linear_ticks(0, peak, 3)
        if t == int(t)
    )
    summary = f"{name}: {sum(counts):,.0f} {what} between {edge_text(first)} and {edge_text(last)}"
    role = 'role="group"' if links else 'role="img"'
    return Markup(
        f'<svg class="chart bars" viewBox="0 0 {width} {height}" {role} aria-label="{escape(summary)}">'
        f'{marks}{"".join(bars)}<path class="axis" d="M{LEFT} {bottom}H{width - RIGHT}"/></svg>'
    )


def activation_histogram(feature: Any) -> Markup:
    """How large a feature's values are when it fires."""
    edges, counts = feature.histogram
    return histogram(edges.tolist(), counts.tolist(), name="Values when it fires", what="tokens")


def meter(share: float, *, width: int = 64) -> Markup:
    """A thin bar filled to ``share`` (0 to 1); the number is always printed beside it, so it is hidden from readers."""
    filled = 0 if share <= 0 or math.isnan(share) else max(1.5, min(share, 1) * width)
    return Markup(
        f'<svg class="meter" viewBox="0 0 {width} 6" width="{width}" height="6" aria-hidden="true">'
        f'<rect class="rail" width="{width}" height="6" rx="3"/>'
        f'<rect class="fill" width="{filled:.1f}" height="6" rx="3"/></svg>'
    )


# ---- axes -----------------------------------------------------------------------------------------------------


def y_tick(y: float, label: str, width: int) -> str:
    return (
        f'<path class="grid" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def x_tick(x: float, bottom: float, label: str, *, end: bool) -> str:
    anchor = "end" if end else "middle"
    return (
        f'<path class="axis" d="M{x:.1f} {bottom}v4"/>'
        f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="{anchor}">{escape(label)}</text>'
    )


def linear_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) within ``[low, high]``.

    >>> linear_ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


def short_count(n: float) -> str:
    """``1200000`` as ``1.2M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{letter}"
    return number(n)
