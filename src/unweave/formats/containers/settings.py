"""JSON and YAML files: values by name, of the types one asks for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml

from unweave.errors import UnweaveError

T = TypeVar("T")
MAX_SETTINGS = 1 << 22
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "keys and values"}
_WORDS.update({list: "a list", object: "a value"})


class Settings(Mapping[str, Any]):
    """A mapping out of a file that somebody else wrote: every look-up says which type it expects.

    ``get`` of a key that is missing, or null, gives the default; ``need`` refuses.
    """

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self._values, self.origin = dict(values), origin

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def need(self, key: str, kind: type[T]) -> T:
        value = self._typed(key, kind)
        if value is None:
            known = ", ".join(list(self._values)[:16])
            raise UnweaveError(f"{self.origin}: expected a key {key!r} ({_WORDS[kind]}), found {known or 'no keys'}")
        return value

    @overload
    def get(self, key: str, kind: type[T]) -> T | None: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        value = self._typed(key, kind)
        return default if value is None else value

    def section(self, key: str) -> Settings:
        """A mapping within; an empty one when it is not there."""
        return Settings(self.get(key, dict, {}), f"{self.origin}, {key}")

    def size(self, key: str) -> int:
        """A whole number of 1 or more."""
        value = self.need(key, int)
        if not 1 <= value < 1 << 40:
            raise UnweaveError(f"{self.origin}: expected {key!r} to be 1 or more, found {str(value)[:40]}")
        return value

    def _typed(self, key: str, kind: type[T]) -> T | None:
        value = self._values.get(key)
        if value is None or kind is object:  # whatever it is
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53:
            value = float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        right = isinstance(value, kind) and (kind is bool) == isinstance(value, bool)
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            raise UnweaveError(f"{self.origin}: expected {key!r} to be {_WORDS[kind]}, found {_short(value)}")
        return value  # pyright: ignore[reportReturnType]


def read_settings(path: Path) -> Settings:
    """A JSON file, or a YAML file by its name.

    Raises:
        UnweaveError: when it is neither, too large, not keys and values, or (YAML) refers to itself.
    """
    try:
        if path.stat().st_size > MAX_SETTINGS:
            raise UnweaveError(f"{path}: expected a configuration of at most {MAX_SETTINGS:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnweaveError(f"cannot read {path}: {error}") from None
    kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
    try:
        values = _yaml(text) if kind == "YAML" else json.loads(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnweaveError(f"{path} is not valid {kind} ({reason}); it may be cut short") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UnweaveError(f"{path}: expected names and values at the top level, found {_short(values)}")
    return Settings(values, str(path))


def _yaml(text: str) -> Any:
    # An alias of an alias of an alias is how a page of YAML becomes a gigabyte.
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("aliases are not allowed")
    return yaml.safe_load(text)


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    return repr(value)[:60]
