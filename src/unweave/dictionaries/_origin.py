"""Refusing to use a dictionary where nobody knows that it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unweave.errors import UnweaveError


def check_origin(trained_on: Mapping[str, Any] | None, place: Mapping[str, Any], doing: str) -> None:
    """Raise unless a dictionary is known to be for the model, site and target site of ``place``.

    Args:
        trained_on: what is known of the rows it was trained on (see :class:`~unweave.dictionaries.Dictionary`); None
            passes: it was made in this process, by someone who knows.
        place: the provenance of rows, or as much of it; what it does not name is not compared. doing: in words.

    Raises:
        UnweaveError: when one of them is another, or is not known.
    """
    if trained_on is None:
        return
    theirs, ours = trained_on.get("sources"), place.get("sources")  # of rows of several models
    pairs = zip(theirs, ours) if theirs and ours else [(trained_on, place)]
    for what, expected, found in (
        *(("model", model_of(a), model_of(b)) for a, b in pairs),
        ("site", trained_on.get("site"), place.get("site")),
        ("target site", _target(trained_on), _target(place)),
    ):
        if not found or (expected and _same(expected, found)):
            continue
        if expected:
            raise UnweaveError(
                f"this dictionary was trained on {what} {words(expected)}, but {doing} {what} {words(found)}: what "
                "came out would mean nothing. Use the model and site it was trained on, or force=True (--force)"
            )
        raise UnweaveError(
            f"it is not known which {what} this dictionary was trained on, and it is {doing} {what} {words(found)}. "
            "If it belongs there, say so by force=True (--force); `unweave verify` finds out whether it does"
        )


def same_model(a: Any, b: Any) -> bool | None:
    """Whether two models, each a name or what a provenance says of it, are one; None if that cannot be told.

    By the hash of their weights where both have one; else by revision and name, where a folder of a hub's model has the
    last part of its name.
    """
    a, b = (one if isinstance(one, Mapping) else {"name": one} for one in (a, b))
    for key in ("sha256", "revision"):
        if a.get(key) and b.get(key) and (key == "sha256" or a[key] != b[key]):
            return a[key] == b[key]
    if not (a.get("name") and b.get("name")):
        return None
    names = [str(one["name"]).rstrip("/") for one in (a, b)]
    if all(name.count("/") == 1 for name in names):  # two of a hub
        return names[0] == names[1]
    return names[0].rpartition("/")[2].lower() == names[1].rpartition("/")[2].lower()


def _same(a: Any, b: Any) -> bool:
    return same_model(a, b) is True if isinstance(a, Mapping) else a == b


def model_of(provenance: Mapping[str, Any]) -> Any:
    """What a provenance says of its model, None if nothing."""
    model = provenance.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("model"), Mapping):
        model = model["model"]  # a model's own provenance may hold more than its identity
    return {"name": model} if isinstance(model, str) else model


def _target(provenance: Mapping[str, Any]) -> Any:
    return provenance.get("target_site") or provenance.get("site")


def words(thing: Any) -> str:
    """A model, or a site, for people."""
    if not isinstance(thing, Mapping):
        return repr(thing)
    extra = [f"{key} {str(thing[key])[:12]}" for key in ("revision", "sha256") if thing.get(key)]
    return repr(thing.get("name")) + (f" ({', '.join(extra)})" if extra else "")
