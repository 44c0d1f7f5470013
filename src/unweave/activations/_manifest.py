"""manifest.json: what a store holds, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from unweave.config import Config
from unweave.errors import UnweaveError
from unweave.files import read_json, write_json

FORMAT = "unweave.activations/1"
FORMAT_WITH_SIDE = "unweave.activations/2"  # the same, and side inputs: who knows only the first says so
FORMATS = (FORMAT, FORMAT_WITH_SIDE)
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
STORED = {**DTYPES, "int8": torch.int8}  # what the rows may be on disk; int8 rows are read back as one of DTYPES
COUNTS = ("n_rows", "n_items", "n_tokens", "n_batches")

_SHARD_ROWS = 1 << 16
_SHARD_BYTES = 1 << 29  # wide rows make shorter shards, so a writer never holds more than about half a GB


class ShardEntry(Config):
    """One finished shard."""

    file: str
    n_rows: NonNegativeInt
    n_items: NonNegativeInt
    n_tokens: NonNegativeInt
    n_batches: PositiveInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: PositiveInt


class Manifest(Config):
    """The whole of manifest.json. Totals must equal the sums over the shards.

    ``dtype`` is what lies on disk. Rows are read as ``rows_dtype`` where that is set (int8), else as they lie. Side
    inputs, where there are any, have a width and a dtype of their own; without them the file does not mention them.
    """

    format: Literal["unweave.activations/1", "unweave.activations/2"] = FORMAT
    provenance: dict[str, Any]
    d_in: PositiveInt
    d_out: PositiveInt | None
    dtype: Literal["bfloat16", "float16", "float32", "float64", "int8"]
    rows_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    d_side: PositiveInt | None = None
    side_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    n_rows: NonNegativeInt = 0
    n_items: NonNegativeInt = 0
    n_tokens: NonNegativeInt = 0
    n_batches: NonNegativeInt = 0
    complete: bool = False
    shard_rows: PositiveInt
    shards: tuple[ShardEntry, ...] = ()

    @model_validator(mode="after")
    def _totals(self) -> Self:
        for i, shard in enumerate(self.shards):
            # The names are fixed by position, so a manifest can never point a reader outside its folder.
            if shard.file != shard_name(i):
                raise ValueError(f"shard {i} must be called {shard_name(i)!r}, found {shard.file!r}")
        for name in COUNTS:
            total = sum(getattr(shard, name) for shard in self.shards)
            if getattr(self, name) != total:
                raise ValueError(f"{name} is {getattr(self, name)}, but its shards add up to {total}")
        if (self.dtype == "int8") != (self.rows_dtype is not None):
            raise ValueError("rows_dtype says what int8 rows are read as, and goes with dtype int8 only")
        if not ((self.d_side is None) == (self.side_dtype is None) == (self.format == FORMAT)):
            raise ValueError(f"d_side and side_dtype go together, and with format {FORMAT_WITH_SIDE!r} only")
        return self

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.d_side is None:
            del values["d_side"], values["side_dtype"]
        return values

    @property
    def read_dtype(self) -> torch.dtype:
        """What rows are handed out as, and must be appended as."""
        return DTYPES[self.rows_dtype or self.dtype]

    @property
    def side_bytes(self) -> int:
        """What the side inputs of one row take."""
        return 0 if self.d_side is None or self.side_dtype is None else self.d_side * DTYPES[self.side_dtype].itemsize

    def with_shard(self, index: int, entry: ShardEntry, *, complete: bool) -> Manifest:
        """A copy with shard ``index`` added or replaced."""
        shards = (*self.shards[:index], entry, *self.shards[index + 1 :])
        totals = {name: sum(getattr(shard, name) for shard in shards) for name in COUNTS}
        return self.replace(shards=shards, complete=complete, **totals)


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def default_shard_rows(row_bytes: int) -> int:
    """65,536 rows, or fewer where rows are so wide that a shard would pass half a GB."""
    return max(1024, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes))


def dtype_name(dtype: str | torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16`` or ``"bfloat16"``."""
    name = str(dtype).removeprefix("torch.")
    if name not in STORED:
        raise UnweaveError(f"activations are stored as one of {', '.join(STORED)}, found {name!r}")
    return name


def rows_dtype_name(stored: str, rows: str | torch.dtype | None) -> str | None:
    """The ``rows_dtype`` of a manifest whose ``dtype`` is ``stored``."""
    name = None if rows is None else dtype_name(rows)
    if stored == "int8":
        if name in ("int8", "float64"):
            raise UnweaveError(
                f"int8 keeps bfloat16, float16 or float32 rows, found {name} rows: store them as they are"
            )
        return name or "bfloat16"
    if name not in (None, stored):
        raise UnweaveError(f"only int8 rows are read back as another dtype: rows_dtype {name} with dtype {stored}")
    return None


def as_stored(provenance: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Provenance of rows kept as ``dtype``: int8 rows are not the rows of the source, and say so."""
    return {**provenance, "stored": dtype} if dtype == "int8" else dict(provenance)


def load_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    if not path.is_file():
        raise UnweaveError(f"no activation store in {folder}: expected {path.name} there. harvest() makes one")
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if found not in FORMATS:
        raise UnweaveError(f"{path}: expected format {FORMAT!r}, found {found!r}; is it another kind of folder?")
    try:
        return Manifest.from_dict(values)
    except UnweaveError as error:
        raise UnweaveError(f"{path} is damaged. {error}") from None


def save_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / "manifest.json", manifest.to_dict())


def plain_json(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance as JSON gives it back (tuples become lists), so that old and new compare equal."""
    try:
        return json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UnweaveError(f"provenance must be plain JSON values: {error}") from None


def differences(expected: Any, found: Any, key: str = "") -> Iterator[str]:
    """``key.subkey: expected X, found Y`` for every leaf in which two JSON values differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in expected.keys() | found.keys():
            inner = f"{key}.{name}" if key else name
            if name not in found:
                yield f"{inner}: expected {_short(expected[name])}, found nothing"
            elif name not in expected:
                yield f"{inner}: expected nothing, found {_short(found[name])}"
            else:
                yield from differences(expected[name], found[name], inner)
    elif expected != found:
        yield f"{key}: expected {_short(expected)}, found {_short(found)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
