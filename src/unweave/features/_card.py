"""The card of a feature as self-contained HTML, for notebooks and for anyone who includes ``card.html``."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2

from unweave.features.feature import Feature

LEVELS = 10  # shades of a token's background


@cache
def environment() -> jinja2.Environment:
    """Autoescape is on: text from data never becomes markup."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("unweave.features", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(card_filters())
    return env


def card_filters() -> dict[str, Any]:
    """The filters ``card.html`` needs, for another environment that includes it."""
    return {"shade": shade, "short": short, "seen": seen, "bars": bars}


def feature_card_html(feature: Feature, link: Any = None) -> str:
    """One feature as HTML that needs nothing else: style, histogram and contexts are inside.

    Args:
        feature: of a store.
        link: where other features are, as ``"/features/"`` (the number is appended) or a function of the number;
            without it their numbers are plain text.
    """
    template: Any = environment().get_template("card.html").module
    return f"{template.style()}{template.card(feature, link)}"


def shade(value: float, max_value: float) -> int:
    """From 0 (silent) to ``LEVELS`` (the feature's largest ``|value|``)."""
    if value == 0 or max_value <= 0:
        return 0
    return max(1, min(LEVELS, round(LEVELS * abs(value) / max_value)))


def short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}".replace("-", "−")


def seen(text: str) -> str:
    """Text with line breaks and tabs that can be seen."""
    return text.replace("\r\n", "↵").replace("\n", "↵").replace("\r", "↵").replace("\t", "⇥")


def bars(feature: Feature, width: float = 240.0, height: float = 48.0) -> list[dict[str, Any]]:
    """The histogram as rectangles of an SVG; square-root heights, so that rare large values stay visible."""
    edges, counts = feature.histogram
    tallest = max(float(counts.max()) ** 0.5, 1.0)
    step = width / len(counts)
    made = []
    for i, count in enumerate(counts.tolist()):
        tall = height * count**0.5 / tallest
        low, high = short(edges[i]), short(edges[i + 1])
        made.append(
            {"x": f"{i * step:.2f}", "y": f"{height - tall:.2f}", "width": f"{max(step - 1, 0.5):.2f}",
             "height": f"{tall:.2f}", "title": f"{low} to {high}: {count:,}"}
        )  # fmt: skip
    return made
