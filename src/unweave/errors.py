"""The one error type users meet: what was expected, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnweaveError(Exception):
    """Bad input or a broken file, told in one clear message.

    The command line prints the message without a traceback and exits with status 2; library users catch it
    like any exception.
    """


class NoText(UnweaveError):
    """A split of the documents gives not one context to run the model on."""


def near_names(name: str, known: Iterable[str], n: int = 4) -> str:
    """A hint such as ``did you mean 'layers.12', 'layers.2'?`` for a misspelt name, or the start of the list."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    if close:
        return "did you mean " + ", ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(k) for k in known[:12])
    return f"known: {shown}{', ...' if len(known) > 12 else ''}"
