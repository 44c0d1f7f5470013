"""Rows that exist already: arrays, lists of arrays, functions that yield arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.sources._base import Source

Rows = Any  # (n, d) numpy array or tensor, a sequence of them, or a function returning an iterator of them


class ArraySource(Source):
    """Activation rows from numpy arrays or tensors.

    Args:
        array: ``(n, d)`` array or tensor (a numpy memmap is read piece by piece), a list of such, or a function
            without arguments that returns an iterator of such, afresh at each call.
        target: the same kind of thing with as many rows, or None where the target is the input.
        side: likewise, side inputs for dictionaries that take some, or None.
        batch_rows: rows per batch. name: what the data is, for provenance.

    float16, bfloat16 and float32 rows keep their dtype, all others become float32.

    Raises:
        UnweaveError: for wrong shapes; while iterating, for NaN or infinite rows (naming the first), or when the
            data gives no row.
    """

    def __init__(
        self, array: Rows, target: Rows = None, *, side: Rows = None, batch_rows: int = 4096, name: str = "array"
    ) -> None:
        if batch_rows < 1:
            raise UnweaveError(f"batch_rows must be at least 1, found {batch_rows}")
        self._input = _opener(array, "array")
        self._target = None if target is None else _opener(target, "target")
        self._side = None if side is None else _opener(side, "side")
        self.batch_rows, self.name = batch_rows, name
        self._first = self._first_rows()
        for what, other in (("target", target), ("side", side)):
            if other is not None and _is_rows(array) and _is_rows(other):
                _same_rows(len(array), len(other), what)

    def _first_rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        first = next(_cut(self._input(), self.batch_rows), None)
        if first is None:
            raise UnweaveError("the array holds no row: expected shape (n, d) with n > 0")
        target, side = (
            None if opened is None else next(_cut(opened(), self.batch_rows), first[:0])
            for opened in (self._target, self._side)
        )
        return first, first if target is None else target, side

    @property
    def d_in(self) -> int:
        return self._first[0].shape[1]

    @property
    def d_out(self) -> int:
        return self._first[1].shape[1]

    @property
    def d_side(self) -> int | None:
        return None if self._first[2] is None else self._first[2].shape[1]

    @property
    def provenance(self) -> dict[str, Any]:
        rows, target, side = self._first
        digest = hashlib.sha256()
        for tensor in (rows, *((target,) if self._target is not None else ()), *((side,) if side is not None else ())):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return {
            "kind": "array",
            "dtype": str(rows.dtype).removeprefix("torch."),
            "batch_rows": self.batch_rows,
            "data": {"name": self.name, "sha256_of_first_batch": digest.hexdigest()},
        }

    def __repr__(self) -> str:
        side = f", d_side {self.d_side}" if self.d_side else ""
        return f"ArraySource({self.name}: d_in {self.d_in}, d_out {self.d_out}{side})"

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        opened = {"target": (self._target, self.d_out), "side": (self._side, self.d_side)}
        beside = {what: (_cut(o(), self.batch_rows), width) for what, (o, width) in opened.items() if o is not None}
        first = 0
        for number, rows in enumerate(_cut(self._input(), self.batch_rows)):
            found: dict[str, Tensor] = {}
            for what, (pieces, _) in beside.items():
                piece = next(pieces, rows[:0])
                _same_rows(first + len(rows), first + len(piece), what)
                found[what] = piece
            if number >= skip:
                _check_finite(rows, first, self.d_in, "array")
                for what, piece in found.items():
                    _check_finite(piece, first, beside[what][1] or 0, what)
                yield ActivationBatch.of_rows(rows, found.get("target"), first, found.get("side"))
            first += len(rows)
        for what, (pieces, _) in beside.items():
            if (extra := next(pieces, None)) is not None:
                _same_rows(first, first + len(extra), what)


def _is_rows(array: Any) -> bool:
    return isinstance(array, (np.ndarray, Tensor))


def _opener(array: Rows, what: str) -> Callable[[], Iterator[Any]]:
    """A function that starts the pieces from the beginning."""
    if _is_rows(array):
        _check_shape(array, what)
        return lambda: iter([array])
    if isinstance(array, Sequence) and not isinstance(array, (str, bytes)):
        parts = list(array)
        for part in parts:
            _check_shape(part, what)
        return lambda: iter(parts)
    if callable(array):
        start: Any = array
        return lambda: iter(start())
    if isinstance(array, Iterable) and not isinstance(array, (str, bytes)):
        raise UnweaveError(
            f"{what}: a generator can be read only once, and training reads data again and again. Give a function "
            "that returns a new iterator, or a list of arrays"
        )
    raise UnweaveError(f"{what}: expected an (n, d) array, a list of them or a function, found {type(array).__name__}")


def _check_shape(array: Any, what: str) -> None:
    if not _is_rows(array):
        raise UnweaveError(f"{what}: expected (n, d) numpy arrays or tensors, found {type(array).__name__}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise UnweaveError(f"{what}: expected shape (n, d), found {tuple(array.shape)}")


def _cut(pieces: Iterator[Any], n: int) -> Iterator[Tensor]:
    """Tensors of ``n`` rows (the last one shorter), across the borders of the pieces."""
    waiting: list[Tensor] = []
    count = 0
    for piece in pieces:
        _check_shape(piece, "array")
        start = 0
        while start < len(piece):
            part = piece[start : start + n - count]
            start += len(part)
            waiting.append(_to_tensor(part))
            count += len(part)
            if count == n:
                yield _join(waiting)
                waiting, count = [], 0
    if waiting:
        yield _join(waiting)


def _join(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[1] for part in parts}) > 1:
        raise UnweaveError(f"the arrays differ in width: {sorted({part.shape[1] for part in parts})}")
    return torch.cat(parts)


def _to_tensor(part: Any) -> Tensor:
    if isinstance(part, np.ndarray):
        if part.dtype.kind not in "fiub":
            raise UnweaveError(f"array: expected numbers, found dtype {part.dtype}")
        kept = part.dtype in (np.float16, np.float32)
        # A copy: rows of a read-only memmap must not be handed on as a writable tensor.
        return torch.from_numpy(np.array(part, dtype=part.dtype if kept else np.float32))
    part = part.detach().cpu()
    return part if part.dtype in (torch.float16, torch.bfloat16, torch.float32) else part.float()


def _same_rows(n: int, n_other: int, what: str) -> None:
    if n != n_other:
        raise UnweaveError(f"array and {what} must have equally many rows, found {n:,} and {n_other:,}")


def _check_finite(rows: Tensor, first: int, width: int, what: str) -> None:
    if rows.shape[1] != width:
        raise UnweaveError(f"{what}: expected rows of width {width}, found {rows.shape[1]} from row {first:,} on")
    finite = torch.isfinite(rows).all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        raise UnweaveError(
            f"{what}: row {first + int(bad[0]):,} holds NaN or infinity ({len(bad):,} such rows in this batch of "
            f"{len(rows):,}). Drop these rows, or look for an overflow where they were made"
        )
