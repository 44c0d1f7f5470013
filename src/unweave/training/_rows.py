"""What ``fit`` accepts as data, made into a Source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.activations.store import ActivationStore
from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.sources._base import Source
from unweave.sources.arrays import ArraySource

_KEPT_BYTES = 2 << 30  # of an iterator's rows, for a second pass
_CHECKED_ROWS = 65_536
_ROW_KINDS = "a (n, d) array or tensor, a list or iterator of them, an ActivationStore or a Source"


@dataclass(frozen=True)
class Rows:
    """A source, how many rows it has (None: nobody knows), and whether its target is not its input."""

    source: Source | ActivationStore
    n_rows: int | None
    has_target: bool


def rows_of(data: Any, target: Any = None, side: Any = None, *, read_all: bool = True) -> Rows:
    """Rows from whatever the user has.

    Args:
        read_all: read an iterator to its end now, rather than while training goes on.

    Raises:
        UnweaveError: for data of the wrong shape or kind, empty data, NaN or infinity.
    """
    if hasattr(data, "batches") and hasattr(data, "d_in"):
        if target is not None:
            raise UnweaveError(f"a {type(data).__name__} brings its own target: leave target out")
        if side is not None:
            raise UnweaveError(f"a {type(data).__name__} brings its own side inputs: leave side out")
        n_rows = getattr(data, "n_rows", None)
        if n_rows == 0:
            raise UnweaveError(f"expected at least one row, found none in {data!r}")
        return Rows(data, n_rows, _separate_target(data))
    if _is_array(data) or isinstance(data, list | tuple):
        others = {"target": target, "side": side}
        beside = {what: _chunks(rows, what) for what, rows in others.items() if rows is not None}
        return _in_memory(_chunks(data, "data"), **beside)
    if callable(data):
        return Rows(ArraySource(data, target, side=side), None, target is not None)
    if target is not None:
        raise UnweaveError("target does not go with an iterator: let the iterator yield (rows, target) pairs")
    if side is not None:
        raise UnweaveError("side does not go with an iterator: give arrays, or a function that returns an iterator")
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise UnweaveError(f"expected {_ROW_KINDS}, found {type(data).__name__}")
    pairs = (_pair(item, i) for i, item in enumerate(data))
    if not read_all:
        source = IteratorSource(pairs)
        return Rows(source, None, source.has_target)
    read = list(pairs)
    separate = any(x is not y for x, y in read)
    return _in_memory([x for x, _ in read], [y for _, y in read] if separate else None)


def _separate_target(source: Any) -> bool:
    """Whether the source predicts something other than its input; where it does not say, its first batch does."""
    if hasattr(source, "has_target"):
        return bool(source.has_target)
    if "target_site" in source.provenance:
        return source.provenance["target_site"] != source.provenance["site"]
    first = next(iter(source.batches()), None) if source.d_in == source.d_out else None
    return source.d_in != source.d_out or (first is not None and first.target is not first.input)


def _in_memory(inputs: list[Any], target: list[Any] | None = None, side: list[Any] | None = None) -> Rows:
    n = sum(len(x) for x in inputs)
    if n == 0:
        raise UnweaveError("expected at least one row, found none")
    for what, arrays in (("data", inputs), ("target", target or []), ("side", side or [])):
        for i, array in enumerate(arrays):
            if array.shape[1] != arrays[0].shape[1]:
                raise UnweaveError(
                    f"{what}: array {i} has rows of width {array.shape[1]}, the first has {arrays[0].shape[1]}"
                )
        first = 0
        for array in arrays:
            _check_finite(array, first, what)
            first += len(array)
    for what, arrays in (("a target", target), ("side inputs", side)):
        n_found = sum(len(y) for y in arrays) if arrays is not None else n
        if n_found != n:
            raise UnweaveError(f"expected {what} for each of the {n:,} rows, found {n_found:,}")
    full = [arrays and [part for part in arrays if len(part)] for arrays in (inputs, target, side)]
    return Rows(ArraySource(full[0], full[1], side=full[2]), n, target is not None)


def _check_finite(array: Any, first: int, what: str) -> None:
    """Refuse NaN and infinity before training starts; arrays mapped from disk are checked as they are read."""
    if isinstance(array, np.memmap):
        return
    for start in range(0, len(array), _CHECKED_ROWS):
        part = array[start : start + _CHECKED_ROWS]
        finite = (torch.isfinite(part.detach()) if isinstance(part, Tensor) else np.isfinite(part)).all(1)
        if not bool(finite.all()):
            row = first + start + int(finite.argmin() if isinstance(finite, np.ndarray) else finite.int().argmin())
            raise UnweaveError(f"{what}: row {row:,} holds NaN or infinity. Drop such rows, or fill their gaps")


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__")


def _matrix(value: Any, what: str) -> Any:
    """A ``(n, d)`` tensor or numpy array of real numbers."""
    if not isinstance(value, Tensor | np.memmap):
        try:
            value = np.array(value, copy=None)
        except (TypeError, ValueError) as error:
            raise UnweaveError(f"{what}: expected {_ROW_KINDS}, found {type(value).__name__} ({error})") from None
        if value.dtype.kind not in "fiub":
            raise UnweaveError(f"{what}: expected real numbers, found dtype {value.dtype}")
    if value.ndim != 2 or value.shape[1] == 0:
        hint = "" if value.ndim == 2 else ": give one row per sample, as x.reshape(-1, d) does"
        raise UnweaveError(f"{what}: expected shape (n, d), found {tuple(value.shape)}{hint}")
    return value


def _chunks(values: Any, what: str) -> list[Any]:
    """The arrays of a list; a single array, or a plain list of rows of numbers, is a list of one."""
    if _is_array(values):
        return [_matrix(values, what)]
    if len(values) and not _is_array(values[0]):
        return [_matrix(values, what)]
    return [_matrix(value, f"{what}, array {i}") for i, value in enumerate(values)]


def _pair(item: Any, i: int) -> tuple[Tensor, Tensor]:
    """The rows and the target of one item of an iterator, as tensors; the same tensor without a target."""
    if isinstance(item, tuple | list) and len(item) == 2 and all(_is_array(part) for part in item):
        x, y = _tensor(_matrix(item[0], f"array {i}")), _tensor(_matrix(item[1], f"target {i}"))
        if len(x) != len(y):
            raise UnweaveError(f"array {i}: expected a target for each of the {len(x):,} rows, found {len(y):,}")
        return x, y
    x = _tensor(_matrix(item, f"array {i}"))
    return x, x


def _tensor(array: Any) -> Tensor:
    """On the CPU, in float32 or a shorter float type; a copy, for a generator may fill one buffer again and again."""
    tensor = array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    kept = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return tensor.to(tensor.dtype if kept else torch.float32, copy=True)


class IteratorSource(Source):
    """Rows of an iterator, read as they are needed; each of its arrays is one batch.

    An iterator gives its rows once. The first 2 GB are kept for a second pass; if the iterator ends before training
    does, later passes run over those.
    """

    def __init__(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        self._pairs = pairs
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._bytes = self._read = 0
        if not self._more():
            raise UnweaveError("expected at least one row, found none (an empty iterator)")
        self.has_target = self._kept[0][0] is not self._kept[0][1]

    @property
    def d_in(self) -> int:
        return self._kept[0][0].shape[1]

    @property
    def d_out(self) -> int:
        return self._kept[0][1].shape[1]

    @property
    def provenance(self) -> dict[str, Any]:
        first = self._kept[0][0].float().contiguous().numpy().tobytes()
        digest = hashlib.sha256(first).hexdigest()
        return {"kind": "iterator", "d_in": self.d_in, "d_out": self.d_out, "sha256_of_first_array": digest}

    def _more(self) -> tuple[Tensor, Tensor] | None:
        pair = next((p for p in self._pairs if len(p[0])), None)
        if pair is None:
            return None
        for part in pair:
            _check_finite(part, 0, f"array {self._read}")
        if self._read and (pair[0].shape[1], pair[1].shape[1]) != (self.d_in, self.d_out):
            raise UnweaveError(
                f"array {self._read} has rows of width {pair[0].shape[1]}, the first has {self.d_in}: all must be equal"
            )
        self._read += 1
        if self._bytes < _KEPT_BYTES:
            self._kept.append(pair)
            self._bytes += sum(part.nbytes for part in pair)
        return pair

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        """The arrays from number ``skip`` on."""
        number, first = 0, 0
        while True:
            pair = self._kept[number] if number < len(self._kept) else None
            if pair is None and number < self._read:
                return  # read before, and not kept
            pair = pair or self._more()
            if pair is None:
                return
            if number >= skip:
                x, y = pair
                yield ActivationBatch.of_rows(x, None if x is y else y, first)
            first += len(pair[0])
            number += 1
