"""Write docs/architectures.md and a page for each architecture, from the code and the last league table.

    python docs/architectures.py

Run it after changing an architecture's docstring, citation or options; a test compares the pages with the code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unweave.dictionaries import names
from unweave.dictionaries.describe import Architecture, describe

DOCS = Path(__file__).parent
LEAGUE = DOCS / "league.json"


def pages() -> dict[str, str]:
    """The text of every page, by its path inside docs/."""
    league = json.loads(LEAGUE.read_text(encoding="utf-8")) if LEAGUE.is_file() else {}
    described = [describe(name) for name in names() if describe(name).kind.__module__.startswith("unweave.")]
    made = {f"architectures/{arch.name}.md": page(arch, league) for arch in described}
    return {"architectures.md": overview(described, league), **made}


def overview(described: list[Architecture], league: dict[str, Any]) -> str:
    lines = [
        "# Architectures",
        "",
        "Everything that `unweave train --arch NAME` and `unweave.fit(rows, arch=NAME)` know. This table and its pages",
        "are made from the code by `python docs/architectures.py`; in a terminal `unweave archs` says the same.",
    ]
    if league:
        lines += ["", "How they compare at equal data and L0: [the league table](league.md)."]
    lines += ["", "| name | what it does | good for | source |", "|---|---|---|---|"]
    for arch in described:
        cells = (f"[{arch.name}](architectures/{arch.name}.md)", arch.summary, arch.good_for, arch.citation)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def page(arch: Architecture, league: dict[str, Any]) -> str:
    lines = [f"# {arch.name}", "", *_spaced(paragraph.replace("``", "`") for paragraph in arch.paragraphs)]
    if arch.good_for:
        lines += [f"**Good for** {arch.good_for}", ""]
    lines += [f"**Source** {arch.citation}", "", f"Trained {arch.training}. Its decoder is {arch.decoder}.", ""]
    lines += ["```bash", f"unweave train --arch {arch.name}", "```", ""]
    if arch.options:
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
        for option in arch.options:
            default = "required" if option.required else f"`{option.default}`"
            lines.append(f"| `{option.name}` | {_cell(option.type)} | {default} | {_cell(option.meaning)} |")
        lines += ["", "On the command line an option is `dictionary.options.NAME=VALUE`, in Python a keyword of `fit`."]
    measured = league.get("architectures", {}).get(arch.name)
    if measured:
        lines += ["", f"## Measured ({league['date']}, see [the league table](../league.md))", ""]
        lines += ["| data | " + " | ".join(league["columns"]) + " |", "|---|" + "---:|" * len(league["columns"])]
        lines += [f"| {data} | " + " | ".join(cells) + " |" for data, cells in measured["rows"].items()]
        if measured.get("note"):
            lines += ["", measured["note"]]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("\n", " ")


def _spaced(paragraphs: Any) -> list[str]:
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def main() -> None:
    made = pages()
    for old in (DOCS / "architectures").glob("*.md"):
        if f"architectures/{old.name}" not in made:
            old.unlink()
    for name, text in made.items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
