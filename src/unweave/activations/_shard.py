"""One shard: batches gathered into tensors on the way in, memory-mapped slices on the way out."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.activations._int8 import dequantise, is_sound, quantise
from unweave.activations._manifest import DTYPES, STORED, Manifest, ShardEntry
from unweave.batch import ActivationBatch, Items, Meta
from unweave.errors import UnweaveError
from unweave.files import sha256_file, write_tensors

_OPEN_SHARDS = 256  # mapped at a time; mapping one again costs about 0.1 ms


class ShardBuilder:
    """Batches waiting to become a shard. Holds copies, so a source may reuse its buffers."""

    def __init__(self) -> None:
        self.batches: list[ActivationBatch] = []
        self.n_rows = 0
        self.n_items = 0

    def add(self, batch: ActivationBatch) -> None:
        inputs = _copy(batch.input)
        target = inputs if batch.target is batch.input else _copy(batch.target)
        items = Items(
            _copy(batch.items.tokens, torch.int32),
            _copy(batch.items.offsets, torch.int64),
            _copy(batch.items.document, torch.int64),
            _copy(batch.items.start, torch.int32),
        )
        side = None if batch.side is None else _copy(batch.side)
        self.batches.append(ActivationBatch(inputs, target, items, _copy(batch.row_token, torch.int64), side))
        self.n_rows += batch.n_rows
        self.n_items += len(items)

    def write(self, folder: Path, file: str, manifest: Manifest) -> ShardEntry:
        """Write the shard atomically. The same batches always give the same bytes."""
        whole = ActivationBatch.concatenate(self.batches)
        sizes = torch.tensor([0] + [len(batch.items) for batch in self.batches])
        rows = {"input": whole.input}
        if manifest.d_out is not None:
            tied = whole.target is whole.input  # safetensors refuses two names for one storage
            rows["target"] = whole.target.clone() if tied else whole.target
        tensors = {
            **(_as_int8(rows) if manifest.dtype == "int8" else rows),
            "row_token": whole.row_token,
            "tokens": whole.items.tokens,
            "item_offsets": whole.items.offsets,
            "item_document": whole.items.document,
            "item_start": whole.items.start,
            "batch_items": sizes.cumsum(0),
        }
        if whole.side is not None:
            tensors["side"] = whole.side
        # One metadata key only: safetensors writes several in no fixed order, and bytes must not depend on luck.
        write_tensors(folder / file, tensors, {"format": manifest.format})
        return ShardEntry(
            file=file,
            n_rows=whole.n_rows,
            n_items=len(whole.items),
            n_tokens=whole.items.n_tokens,
            n_batches=len(self.batches),
            sha256=sha256_file(folder / file),
            bytes=(folder / file).stat().st_size,
        )


class ShardReader:
    """One finished shard, memory-mapped.

    Rows are read as slices that point into the file's pages: callers copy before handing them out, because writing
    into such a slice would change what later reads of the same mapping see.

    Raises:
        UnweaveError: when the header does not hold the tensors the manifest promises.
    """

    def __init__(self, path: Path, entry: ShardEntry, manifest: Manifest) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.n_rows, self.n_batches = path, entry.n_rows, entry.n_batches
        try:
            handle: Any = safe_open(path, "pt")  # holds a mapping and no file descriptor
        except (SafetensorError, OSError) as error:
            raise UnweaveError(f"{path} is not a whole safetensors file ({error}). {how_to_repair(path)}") from None
        self._check_header(handle, entry, manifest)
        self._input = _RowReader(handle, "input", manifest)
        self._target = None if manifest.d_out is None else _RowReader(handle, "target", manifest)
        self._side = None if manifest.d_side is None else handle.get_slice("side")
        self.row_token: Tensor = handle.get_tensor("row_token")
        self.batch_items: Tensor = handle.get_tensor("batch_items")
        self.items = Items(*(handle.get_tensor(f) for f in ("tokens", "item_offsets", "item_document", "item_start")))

    def _check_header(self, handle: Any, entry: ShardEntry, manifest: Manifest) -> None:
        dtype = _SAFETENSORS_NAMES[STORED[manifest.dtype]]
        expected = {
            "row_token": ("I64", [entry.n_rows]),
            "tokens": ("I32", [entry.n_tokens]),
            "item_offsets": ("I64", [entry.n_items + 1]),
            "item_document": ("I64", [entry.n_items]),
            "item_start": ("I32", [entry.n_items]),
            "batch_items": ("I64", [entry.n_batches + 1]),
        }
        for name, width in (("input", manifest.d_in), ("target", manifest.d_out)):
            if width is not None:
                expected[name] = (dtype, [entry.n_rows, width])
                if manifest.dtype == "int8":
                    expected |= {f"{name}.scale": ("F32", [entry.n_rows]), f"{name}.channel": ("F32", [width])}
        if manifest.d_side is not None and manifest.side_dtype is not None:
            expected["side"] = (_SAFETENSORS_NAMES[DTYPES[manifest.side_dtype]], [entry.n_rows, manifest.d_side])
        names: list[str] = handle.keys()
        slices = {name: handle.get_slice(name) for name in names}
        found = {name: (s.get_dtype(), list(s.get_shape())) for name, s in slices.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise UnweaveError(
                    f"{self.path}: tensor {name!r}: expected {_words(expected.get(name))} from the manifest, found "
                    f"{_words(found.get(name))}. {how_to_repair(self.path)}"
                )

    def check_contents(self) -> None:
        """Check that items, rows and batches fit together (what a checksum cannot tell of a file made wrong)."""
        items = self.items
        good = (
            _rises(items.offsets, items.n_tokens)
            and _rises(self.batch_items, len(items))
            and (self.n_rows == 0 or 0 <= int(self.row_token[0]) <= int(self.row_token[-1]) < items.n_tokens)
            and bool((self.row_token.diff() > 0).all())
            and all(rows.is_sound() for rows in (self._input, self._target) if rows is not None)
        )
        if not good:
            raise UnweaveError(
                f"{self.path}: its items, rows and scales do not fit together. {how_to_repair(self.path)}"
            )

    @cached_property
    def row_offsets(self) -> Tensor:
        """``(n_batches + 1,)`` int64, the rows of each batch."""
        return torch.searchsorted(self.row_token, self.items.offsets[self.batch_items])

    @property
    def rows_per_item(self) -> Tensor:
        """``(n_items,)`` int64."""
        return torch.searchsorted(self.row_token, self.items.offsets).diff()

    def input(self, rows: slice | Tensor) -> Tensor:
        """``(n, d_in)``: a view for a slice (int8 rows: a copy), a copy for an index tensor."""
        return self._input.read(rows)

    def target(self, rows: slice | Tensor) -> Tensor:
        return (self._target or self._input).read(rows)

    def side(self, rows: slice | Tensor) -> Tensor | None:
        """``(n, d_side)``, or None where the store has no side inputs."""
        return None if self._side is None else _read(self._side, rows)

    def item_of(self, rows: slice | Tensor) -> Tensor:
        """``(n,)`` int64, the item of each row, numbered within the shard."""
        # Not torch's: it calls up threads for the 256 rows of a block, and waits for them on a busy machine.
        found = np.searchsorted(self.items.offsets.numpy(), self.row_token[rows].numpy(), side="right")
        return torch.from_numpy(found - 1)

    def document(self, rows: slice | Tensor) -> Tensor:
        return self.items.document[self.item_of(rows)]

    def meta(self, rows: slice | Tensor) -> Meta:
        item, token = self.item_of(rows), self.row_token[rows]
        position = self.items.start[item] + (token - self.items.offsets[item]).int()
        return Meta(self.items.document[item], position, self.items.tokens[token])

    def batch(self, index: int) -> ActivationBatch:
        """Batch ``index`` exactly as it was appended."""
        first, last = self.row_offsets[index : index + 2].tolist()
        first_item, last_item = self.batch_items[index : index + 2].tolist()
        return self._cut(slice(first, last), slice(first_item, last_item))

    def batch_of_rows(self, rows: slice) -> ActivationBatch:
        """The rows of a slice, with the whole items they came from."""
        if rows.stop <= rows.start:
            return self._cut(slice(0, 0), slice(0, 0))
        first, last = self.item_of(torch.tensor([rows.start, rows.stop - 1])).tolist()
        return self._cut(rows, slice(first, last + 1))

    def _cut(self, rows: slice, which: slice) -> ActivationBatch:
        inputs = self.input(rows).clone()
        target = inputs if self._target is None else self.target(rows).clone()
        items = self.items[which]
        items = Items(items.tokens.clone(), items.offsets, items.document.clone(), items.start.clone())
        side = self.side(rows)
        side = None if side is None else side.clone()
        return ActivationBatch(inputs, target, items, self.row_token[rows] - self.items.offsets[which.start], side)


class _RowReader:
    """The rows under one name in a shard's file, as they are or from int8."""

    def __init__(self, handle: Any, name: str, manifest: Manifest) -> None:
        self._slice = handle.get_slice(name)
        self._dtype = manifest.read_dtype
        self._scales: tuple[Tensor, Tensor] | None = None
        if manifest.dtype == "int8":
            self._scales = handle.get_tensor(f"{name}.scale"), handle.get_tensor(f"{name}.channel")

    def read(self, rows: slice | Tensor) -> Tensor:
        stored = _read(self._slice, rows)
        if self._scales is None:
            return stored
        return dequantise(stored, self._scales[0][rows], self._scales[1], self._dtype)

    def is_sound(self) -> bool:
        return self._scales is None or is_sound(*self._scales)


def _read(stored: Any, rows: slice | Tensor) -> Tensor:
    """Rows of a tensor in a file: a view for a slice, a copy for an index tensor."""
    return stored[rows] if isinstance(rows, slice) else stored[:].index_select(0, rows)


class ShardPool:
    """The readers of a store, the least recently used given up beyond ``_OPEN_SHARDS``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()

    def __len__(self) -> int:
        return len(self._readers)

    def get(self, entry: ShardEntry, manifest: Manifest) -> ShardReader:
        reader = self._readers.get(entry.file)
        if reader is None:
            reader = ShardReader(self._folder / entry.file, entry, manifest)
            self._readers[entry.file] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(entry.file)
        return reader

    def clear(self) -> None:
        self._readers.clear()


def how_to_repair(path: Path) -> str:
    return (
        f"Delete {path.name} and run the same harvest again: it makes that shard anew and keeps all others "
        "(or copy the file again from where the store came from)."
    )


_SAFETENSORS_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
}


def _as_int8(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, values in rows.items():
        tensors[name], tensors[f"{name}.scale"], tensors[f"{name}.channel"] = quantise(values)
    return tensors


def _copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to("cpu", dtype or tensor.dtype, copy=True)


def _rises(offsets: Tensor, last: int) -> bool:
    return int(offsets[0]) == 0 and int(offsets[-1]) == last and bool((offsets.diff() >= 0).all())


def _words(tensor: tuple[str, list[int]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {tuple(tensor[1])}"
