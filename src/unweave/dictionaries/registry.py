"""Architectures by name."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from unweave.dictionaries._base import Dictionary
from unweave.errors import UnweaveError, near_names

D = TypeVar("D", bound=type[Dictionary])

_REGISTRY: dict[str, type[Dictionary]] = {}


def register(name: str) -> Any:
    """Class decorator: make an architecture known under ``name``.

    >>> @register("my_method")            # doctest: +SKIP
    ... class MyMethod(Dictionary): ...
    """

    def add(kind: D) -> D:
        kind.name = name
        _REGISTRY[name] = kind
        return kind

    return add


def names() -> list[str]:
    """The registered architectures."""

    return sorted(_REGISTRY)


def get(name: str) -> type[Dictionary]:
    """The architecture called ``name``, or ``package.module:Class`` for one that lives elsewhere.

    Raises:
        UnweaveError: for an unknown name, with the near ones.
    """
    known = names()
    if name in _REGISTRY:
        return _REGISTRY[name]
    module, separator, attribute = name.partition(":")
    if separator:
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UnweaveError(f"cannot import architecture {name!r}: {error}") from None
        if not (isinstance(kind, type) and issubclass(kind, Dictionary)):
            raise UnweaveError(f"{name!r} is not a Dictionary subclass")
        if "name" not in vars(kind):
            register(name)(kind)
        return kind
    raise UnweaveError(f"no architecture {name!r}: {near_names(name, known)}")


def build(name: str, d_in: int, n_features: int, d_out: int | None = None, **options: Any) -> Dictionary:
    """A fresh dictionary.

    Args:
        name: the architecture. d_in: input width. n_features: number of features. d_out: output width, if not
            ``d_in``. options: the other fields of the architecture's config.

    Raises:
        UnweaveError: for an unknown name, an option the architecture does not have, or a bad value.
    """
    kind = get(name)
    config = kind.Config(d_in=d_in, d_out=d_out or d_in, n_features=n_features, **options)
    return kind(config)
