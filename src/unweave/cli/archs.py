"""``unweave archs``"""

from __future__ import annotations

from unweave.cli._say import show


def archs() -> None:
    """List the architectures with their options."""
    from rich.table import Table
    from rich.text import Text

    from unweave.dictionaries import DictionaryConfig, get, names

    table = Table("architecture", "what it does", "options (default)")
    for name in names():
        kind = get(name)
        fields = kind.Config.model_fields
        options = [f"{f} ({fields[f].default})" for f in fields if f not in DictionaryConfig.model_fields]
        first = (kind.__doc__ or "").strip().split("\n\n")[0]
        table.add_row(name, Text(f"{first}\n{kind.citation}"), Text(", ".join(options)))
    show(table)
