"""One self-contained HTML file of chosen features: to send, to print, to keep."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from unweave.errors import UnweaveError
from unweave.files import write_text
from unweave.web._lines import FeatureLines
from unweave.web._overview import Overview
from unweave.web._render import render, static_text


def export_html(run: Any, features: Iterable[int], path: str | Path) -> Path:
    """Write the pages of some features, with the run's facts, as one file that asks for nothing else.

    Raises:
        UnweaveError: for no features, a number out of range, a run without a feature index, or a full disk.
    """
    if run.features is None:
        raise UnweaveError(f"run {run.name} has no feature index yet, so there are no features to export")
    wanted = list(dict.fromkeys(int(i) for i in features))
    n = len(run.features)
    if not wanted:
        raise UnweaveError("export_html: expected at least one feature, found none")
    if wrong := [i for i in wanted if not 0 <= i < n]:
        raise UnweaveError(f"export_html: features are numbered 0 to {n - 1}, found {', '.join(map(str, wrong[:5]))}")
    css, script = static_text("site.css"), static_text("contexts.js")
    for name, text in (("site.css", css), ("contexts.js", script)):
        # They are put between tags as they are, so they must not close them.
        assert "</" not in text, f"{name} holds a closing tag"
    here = set(wanted)
    html = render(
        "export.html",
        run_name=run.name,
        overview=Overview(run),
        features=[FeatureLines.of(run.features, i) for i in wanted],
        names=lambda j: [text for text, _ in run.features[j].top_tokens],
        link=lambda j: f"#f{j}" if j in here else "",
        css=Markup(css),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = Path(path)
    write_text(path, html)
    return path
