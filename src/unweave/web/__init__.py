"""A local browser for sparse features: pages, a JSON API and self-contained exports.

One process, no database, no build step, nothing fetched from elsewhere. FastAPI and uvicorn (the ``web`` extra) are
imported when :func:`create_app` or :func:`serve` is called; :func:`export_html` needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unweave.features import feature_card_html
    from unweave.web._app import create_app
    from unweave.web._export import export_html
    from unweave.web._serve import serve

__all__ = ["create_app", "export_html", "feature_card_html", "serve"]

_HOMES = {
    "create_app": "unweave.web._app",
    "export_html": "unweave.web._export",
    "feature_card_html": "unweave.features",
    "serve": "unweave.web._serve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
