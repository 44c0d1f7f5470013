"""The Jinja environment every view of a feature is rendered with, and the page that stands alone."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unweave.features.card import charts, formatting, lines
from unweave.features.card.lines import FeatureLines
from unweave.features.feature import Feature
from unweave.features.store import FeatureStore

STATIC = files("unweave.features.card") / "static"

CARD_AROUND = 64
"""Tokens kept on each side of a peak in a notebook's card: notebooks are saved with their output."""

Link = str | Callable[[int], str] | None


def new_environment(*more: BaseLoader) -> Environment:
    """An environment over this room's templates and ``more``.

    Autoescape is on for everything: text from data never becomes markup.
    """
    env = Environment(
        loader=ChoiceLoader([*more, PackageLoader("unweave.features.card", "templates")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        number=formatting.number,
        value=formatting.value,
        percent=formatting.percent,
        share=lambda s: f"{s:.0%}",
        part=lambda s: "–" if s is None or math.isnan(s) else f"{s:.1%}",
        one_in=formatting.one_in,
        visible=formatting.visible,
        chip=formatting.chip,
        direction=formatting.direction,
        cosine=lambda c: f"{c:.2f}".replace("-", "−"),
        snippet_runs=lines.snippet,
        meter=charts.meter,
        activation_histogram=charts.activation_histogram,
    )
    return env


@cache
def environment() -> Environment:
    return new_environment()


def page_values(store: FeatureStore, shown: Iterable[FeatureLines], link: Link = None) -> dict[str, Any]:
    """What ``features_page.html`` needs to stand alone: style and script inside, and a policy that allows only them.

    Args:
        link: where other features are, as ``"/features/"`` (the number is appended) or a function of the number,
            where "" is nowhere; without it their numbers are plain text.
    """
    css, script = static_text("feature.css"), static_text("contexts.js")
    for name, text in (("feature.css", css), ("contexts.js", script)):
        # They are put between tags as they are, so they must not close them.
        assert "</" not in text, f"{name} holds a closing tag"
    return {
        "features": list(shown),
        "names": lambda j: [text for text, _ in store[j].top_tokens],
        "link": link if callable(link) else lambda j: f"{link}{j}" if link else "",
        "framed": False,
        "css": Markup(css),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def feature_card_html(feature: Feature, link: Link = None) -> str:
    """One feature as HTML to put into any page: a frame that holds its page, so neither disturbs the other's style.

    The frame is sandboxed: its one script (values on hover, short and whole contexts) reaches nothing outside it, and
    nothing is asked for from elsewhere.

    Args:
        feature: of a store.
        link: as in :func:`page_values`; links open in a new tab.
    """
    store = feature._store
    shown = FeatureLines.of(store, feature.index, around=CARD_AROUND)
    values = {**page_values(store, [shown], link), "framed": True}
    page = environment().get_template("features_page.html").render(values)
    sandbox = "allow-scripts" + (" allow-popups allow-popups-to-escape-sandbox" if link else "")
    frame = Markup(
        '<iframe title="Feature {}" sandbox="{}" width="100%" height="560" '
        'style="display:block;box-sizing:border-box;width:100%;height:560px;border:1px solid #8888;border-radius:8px" '
        'srcdoc="{}"></iframe>'
    )
    return str(frame.format(feature.index, sandbox, page))


@cache
def static_text(name: str) -> str:
    """A style sheet or script of this room."""
    return (STATIC / name).read_text(encoding="utf-8")
