"""Refusing to measure a dictionary on activations it was not made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unweave.dictionaries._base import Dictionary
from unweave.errors import UnweaveError


def check_widths(dictionary: Dictionary, d_in: int, d_out: int, site: str | None) -> None:
    """Raise unless the rows have the widths the dictionary reads and writes."""
    if (dictionary.d_in, dictionary.d_out) != (d_in, d_out):
        where = f" of site {site!r}" if site else ""
        raise UnweaveError(
            f"this dictionary reads rows of width {dictionary.d_in} and writes width {dictionary.d_out}, the rows"
            f"{where} have width {d_in} and the targets {d_out}. Evaluate it on the model and site it was trained on."
        )


def check_provenance(trained_on: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Raise unless both provenances name the same model, site and target site; what one leaves out is not compared."""
    for expected, found, what in (
        *_models(trained_on, source),
        (trained_on.get("site"), source.get("site"), "site"),
        (_target(trained_on), _target(source), "target site"),
    ):
        if expected and found and not _agree(expected, found):
            raise UnweaveError(
                f"this dictionary was trained on {what} {_words(expected)}, but evaluated on {what} {_words(found)}. "
                "The numbers would mean nothing. Use the model and site it was trained on, or force=True to go on."
            )


def check_model(model: Any, source: Mapping[str, Any]) -> None:
    """Raise unless the model spliced into is the one the rows came from."""
    expected, found = _model(source), _model({"model": getattr(model, "provenance", None)})
    if expected and found and not _agree(expected, found):
        raise UnweaveError(
            f"the rows were made with model {_words(expected)}, but the loss would be measured in {_words(found)}. "
            "Load the first, or pass force=True to go on."
        )


def _model(provenance: Mapping[str, Any]) -> Any:
    model = provenance.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("model"), Mapping):
        model = model["model"]  # a model's own provenance may hold more than its identity
    return model


def _models(trained_on: Mapping[str, Any], source: Mapping[str, Any]) -> list[tuple[Any, Any, str]]:
    """The models to compare: one each, or those of each of several sources."""
    theirs, ours = trained_on.get("sources"), source.get("sources")
    pairs = zip(theirs, ours) if theirs and ours else [(trained_on, source)]
    return [(_model(a), _model(b), "model") for a, b in pairs]


def _target(provenance: Mapping[str, Any]) -> Any:
    return provenance.get("target_site") or provenance.get("site")


def _agree(a: Any, b: Any) -> bool:
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return a == b
    if a.get("sha256") and b.get("sha256"):  # the weights themselves: wherever the file lies
        return a["sha256"] == b["sha256"]
    return all(a.get(key) is None or b.get(key) is None or a[key] == b[key] for key in ("name", "revision"))


def _words(thing: Any) -> str:
    if not isinstance(thing, Mapping):
        return repr(thing)
    extra = [f"{key} {str(thing[key])[:12]}" for key in ("revision", "sha256") if thing.get(key)]
    return repr(thing.get("name")) + (f" ({', '.join(extra)})" if extra else "")
