"""The Jinja environment every page, export and notebook card of this room is rendered with."""

from __future__ import annotations

import hashlib
import math
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unweave import __version__
from unweave.web import _charts, _format, _lines

_STATIC = files("unweave.web") / "static"


@cache
def environment() -> Environment:
    """Autoescape is on for everything: text from data never becomes markup."""
    env = Environment(
        loader=PackageLoader("unweave.web", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        number=_format.number,
        value=_format.value,
        percent=_format.percent,
        share=lambda s: f"{s:.0%}",
        one_in=_format.one_in,
        visible=_format.visible,
        chip=_format.chip,
        direction=_format.direction,
        cosine=lambda c: f"{c:.2f}".replace("-", "−"),
        snippet_runs=_lines.snippet,
        meter=_charts.meter,
        density_meter=density_meter,
        activation_histogram=activation_histogram,
    )
    env.globals.update(static=static_url, version=__version__)
    return env


def render(template: str, **values: Any) -> str:
    return environment().get_template(template).render(**values)


@cache
def static_text(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


@cache
def static_url(name: str) -> str:
    """The address of a file in ``static/``; it changes with the content, so browsers may keep the file."""
    digest = hashlib.sha256(static_text(name).encode()).hexdigest()[:10]
    return f"/static/{name}?v={digest}"


def density_meter(density: float) -> Markup:
    """Density on a logarithmic bar from one in a million to one."""
    share = 1 + math.log10(density) / 6 if density > 0 else 0.0
    return _charts.meter(max(share, 0.0), width=64)


def activation_histogram(feature: Any) -> Markup:
    edges, counts = feature.histogram
    return _charts.histogram(
        [float(e) for e in edges],
        [float(c) for c in counts],
        name="Values when it fires",
        what="tokens",
        edge_text=_format.number,
    )
