"""One self-contained HTML file of chosen features: to send, to print, to keep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unweave.errors import UnweaveError
from unweave.features.card import FeatureLines
from unweave.features.card.page import page_values
from unweave.files import write_text
from unweave.web._overview import Overview
from unweave.web._render import render


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
    here = set(wanted)
    shown = [FeatureLines.of(run.features, i) for i in wanted]
    values = page_values(run.features, shown, link=lambda j: f"#f{j}" if j in here else "")
    html = render("export.html", run_name=run.name, overview=Overview(run), **values)
    path = Path(path)
    write_text(path, html)
    return path
