"""Refusing to measure a dictionary on activations it was not made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unweave.dictionaries._base import Dictionary
from unweave.dictionaries._origin import model_of, same_model, words
from unweave.errors import UnweaveError


def check_widths(dictionary: Dictionary, d_in: int, d_out: int, site: str | None) -> None:
    """Raise unless the rows have the widths the dictionary reads and writes."""
    if (dictionary.d_in, dictionary.d_out) != (d_in, d_out):
        where = f" of site {site!r}" if site else ""
        raise UnweaveError(
            f"this dictionary reads rows of width {dictionary.d_in} and writes width {dictionary.d_out}, the rows"
            f"{where} have width {d_in} and the targets {d_out}. Evaluate it on the model and site it was trained on."
        )


def check_model(model: Any, source: Mapping[str, Any]) -> None:
    """Raise unless the model spliced into is the one the rows came from."""
    expected, found = model_of(source), model_of({"model": getattr(model, "provenance", None)})
    if expected and found and same_model(expected, found) is False:
        raise UnweaveError(
            f"the rows were made with model {words(expected)}, but the loss would be measured in {words(found)}. "
            "Load the first, or pass force=True to go on."
        )
