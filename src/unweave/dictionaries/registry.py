"""Architectures by name."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from unweave.dictionaries._base import Dictionary
from unweave.errors import UnweaveError, near_names

D = TypeVar("D", bound=type[Dictionary])

_REGISTRY: dict[str, type[Dictionary]] = {}
# The package's own, and the file that registers each: importing them all would take as long as all the rest.
_FILES = {
    "abs_topk": "abs_topk",
    "abs_topk_skip_transcoder": "transcoder",
    "archetypal": "classical",
    "batch_abs_topk": "batch_abs_topk",
    "batch_topk": "batch_topk",
    "batch_topk_crosscoder": "crosscoder",
    "clt": "clt",
    "crosscoder": "crosscoder",
    "feature_choice": "feature_choice",
    "g_sae": "g_sae",
    "gated": "gated",
    "gba": "gba",
    "glu": "glu",
    "group_max": "group_max",
    "group_max_skip_transcoder": "transcoder",
    "hierarchical_topk": "hierarchical_topk",
    "ica": "classical",
    "itda": "itda",
    "jumprelu": "jumprelu",
    "jumprelu_skip_transcoder": "transcoder",
    "kmeans": "classical",
    "matryoshka": "matryoshka",
    "matryoshka_jumprelu": "matryoshka",
    "matryoshka_topk": "matryoshka",
    "mp": "mp",
    "multi_topk": "multi_topk",
    "mutual_choice": "mutual_choice",
    "nmf": "classical",
    "omp": "omp",
    "ort": "ort",
    "p_anneal": "p_anneal",
    "pca": "classical",
    "poly_batch_topk": "poly",
    "poly_matryoshka": "poly",
    "poly_topk": "poly",
    "random": "classical",
    "relu": "relu",
    "skip_clt": "clt",
    "skip_transcoder": "transcoder",
    "sklearn_dictionary": "classical",
    "standardised_abs_topk": "standardised",
    "standardised_gated": "standardised",
    "standardised_jumprelu": "standardised",
    "standardised_relu": "standardised",
    "standardised_topk": "standardised",
    "switch": "switch",
    "temporal": "temporal",
    "top_afa": "top_afa",
    "topk": "topk",
    "topk_crosscoder": "crosscoder",
    "transcoder": "transcoder",
    "vsae": "vsae",
}


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
    return sorted({*_FILES, *_REGISTRY})


def get(name: str) -> type[Dictionary]:
    """The architecture called ``name``, or ``package.module:Class`` for one that lives elsewhere.

    Raises:
        UnweaveError: for an unknown name, with the near ones.
    """
    if name in _FILES and name not in _REGISTRY:
        importlib.import_module(f"unweave.dictionaries.{_FILES[name]}")
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
    raise UnweaveError(f"no architecture {name!r}: {near_names(name, names())}")


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
