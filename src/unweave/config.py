"""Frozen, validated configuration with JSON and YAML round trips and dotted overrides."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import pydantic
import yaml

from unweave.errors import UnweaveError, near_names
from unweave.files import write_text


class Config(pydantic.BaseModel):
    """Base of every configuration: immutable, checked when made, refusing keys it does not know.

    Raises:
        UnweaveError: naming the field, the value found and what was expected.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise UnweaveError(self._explain(error)) from None

    @classmethod
    def _explain(cls, error: pydantic.ValidationError) -> str:
        lines = []
        for item in error.errors():
            field = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                hint = near_names(field, cls.model_fields)
                lines.append(f"unknown key {field!r} ({hint})")
            else:
                where = f"{field}: " if field else ""
                message = item["msg"].removeprefix("Value error, ")
                found = "" if item["type"] == "missing" or not field else f", found {_short(item.get('input'))}"
                lines.append(f"{where}{message}{found}")
        return f"{cls.__name__}: " + "; ".join(lines)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        if not isinstance(values, Mapping):
            raise UnweaveError(f"{cls.__name__}: expected a mapping of keys to values, found {_short(values)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(json.loads(text))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file and apply ``key.subkey=value`` overrides (values are parsed as YAML)."""
        return cls.from_dict(apply_overrides(read_yaml(path), overrides))

    def to_yaml(self, path: str | Path) -> None:
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise UnweaveError(f"no recipe at {path}{reason}: give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnweaveError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UnweaveError(f"{path}: expected keys and values at the top level, found {_short(values)}")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set ``a.b=value`` entries in nested dictionaries; the value is read as YAML (so 1e-3, true, [1, 2])."""
    result = copy.deepcopy(dict(values))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UnweaveError(f"override {override!r}: expected key=value, for example training.lr=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UnweaveError(f"override {override!r}: {text!r} is not a YAML value") from None
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
            with contextlib.suppress(ValueError):
                value = float(value)
        *parents, last = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UnweaveError(f"override {override!r}: {parent!r} is a value, not a group of keys")
        node[last] = value
    return result


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
