"""``unweave export``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unweave.cli._say import RunFolder, say


def export(
    folder: RunFolder,
    feature: Annotated[str, typer.Option(help="The features, by number: 1,2,3 or 10-20.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("features.html"),
) -> None:
    """Write features into one self-contained HTML file, to send to someone."""
    from unweave.runs import Run
    from unweave.web import export_html

    run = Run(folder)
    export_html(run, _numbers(feature), out)
    say(f"wrote {out} ({out.stat().st_size / 1024:.0f} KB)")


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"expected numbers such as 1,2,3 or 10-20, found {text!r}")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
