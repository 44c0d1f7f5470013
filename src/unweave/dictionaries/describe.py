"""What an architecture is, read from its class: for `unweave archs` and the pages in docs/architectures."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from unweave.dictionaries._base import Dictionary, DictionaryConfig
from unweave.dictionaries._linear import LinearDictionary

_DERIVED = frozenset(DictionaryConfig.model_fields)


@dataclass(frozen=True)
class Option:
    """One field of an architecture's config."""

    name: str
    type: str
    default: Any  # None also where the architecture works it out
    required: bool
    meaning: str


@dataclass(frozen=True)
class Architecture:
    """An architecture in words. ``kind`` is its class."""

    kind: type[Dictionary]

    @property
    def name(self) -> str:
        return self.kind.name

    @cached_property
    def paragraphs(self) -> list[str]:
        """Its docstring: first the equation or rule, then what else there is to know."""
        # Not inspect.getdoc, which would pass off the parent's words as its own.
        text = inspect.cleandoc(self.kind.__doc__ or "")
        return [_unwrapped(paragraph) for paragraph in text.split("\n\n") if paragraph.strip()]

    @property
    def summary(self) -> str:
        return self.paragraphs[0] if self.paragraphs else ""

    @property
    def citation(self) -> str:
        return self.kind.citation

    @property
    def good_for(self) -> str:
        return vars(self.kind).get("good_for", "")  # what suits a parent need not suit its child

    @property
    def training(self) -> str:
        """How it learns, in words."""
        if not self.kind.learns_by_gradient:
            return "without gradients: it takes the batches in"
        if issubclass(self.kind, LinearDictionary) and self.kind.has_closed_form():
            return "in closed form, by the engine's kernels"
        return "by autograd"

    @property
    def decoder(self) -> str:
        return "linear" if self.kind.linear_decoder else "not linear; its directions are a linear view"

    @cached_property
    def options(self) -> list[Option]:
        """The fields of its config that a user may set."""
        meanings: dict[str, str] = {}
        for config in reversed(self.kind.Config.__mro__):
            meanings |= _attributes(config.__doc__ or "")
        found = []
        for name, field in self.kind.Config.model_fields.items():
            if name in _DERIVED:
                continue
            default = None if field.default is PydanticUndefined else field.default
            if field.default_factory is not None:
                default = field.get_default(call_default_factory=True, validated_data={})
            shown = _type_words(field.annotation)
            found.append(Option(name, shown, default, field.is_required(), meanings.get(name, "")))
        return found


def describe(name: str) -> Architecture:
    """The architecture called ``name`` (or ``package.module:Class``), in words.

    Raises:
        UnweaveError: for an unknown name.
    """
    from unweave.dictionaries.registry import get

    return Architecture(get(name))


def _attributes(docstring: str) -> dict[str, str]:
    """Meaning of each field, from the section "Attributes" of a docstring."""
    lines = inspect.cleandoc(docstring).split("\n")
    if "Attributes:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Attributes:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if start := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _unwrapped(paragraph: str) -> str:
    """A paragraph on one line, unless its lines mean something (they are indented, or a list)."""
    lines = paragraph.split("\n")
    return paragraph if any(line.startswith((" ", "- ", "* ")) for line in lines) else " ".join(lines)


def _type_words(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_words(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_type_words, get_args(annotation)))
    if annotation in (None, type(None)):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
