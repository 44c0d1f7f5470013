"""The Jinja environment of the site: its own templates, and those of a feature's card."""

from __future__ import annotations

import hashlib
import math
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from unweave import __version__
from unweave.features.card import charts, page

_FOLDERS = (files("unweave.web") / "static", page.STATIC)


@cache
def environment() -> Environment:
    env = page.new_environment(PackageLoader("unweave.web", "templates"))
    env.filters.update(density_meter=density_meter)
    env.globals.update(static=static_url, version=__version__)
    return env


def render(template: str, **values: Any) -> str:
    return environment().get_template(template).render(**values)


@cache
def static_text(name: str) -> str:
    """A style sheet or script, of the site or of the card."""
    return next(folder / name for folder in _FOLDERS if (folder / name).is_file()).read_text(encoding="utf-8")


@cache
def static_url(name: str) -> str:
    """The address of a file in ``static/``; it changes with the content, so browsers may keep the file."""
    digest = hashlib.sha256(static_text(name).encode()).hexdigest()[:10]
    return f"/static/{name}?v={digest}"


def density_meter(density: float) -> Markup:
    """Density on a logarithmic bar from one in a million to one."""
    share = 1 + math.log10(density) / 6 if density > 0 else 0.0
    return charts.meter(max(share, 0.0), width=64)
