"""SAELens: what ``CacheActivationsRunner`` writes, a ``datasets`` folder (Arrow), or its parquet files from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.formats._facts import site_of_hook
from unweave.formats.containers import Settings, read_settings
from unweave.formats.stores._base import ForeignRows, check_size, check_tokens, contexts, names_in
from unweave.formats.stores.registry import register

_TOKENS, _INFO, _STATE, _RUNNER = "token_ids", "dataset_info.json", "state.json", "cache_activations_runner_cfg.json"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


@register("saelens")
class SAELensCache(ForeignRows):
    """One column of shape (context, d) for each hook, and ``token_ids`` (not in the oldest).

    Only pyarrow is needed: the library's column type lies on nested lists, whose lengths are checked before anything
    is made of them. A local folder does not say which model it was; the copy on the hub does.
    """

    title = "SAELens"
    options: ClassVar[dict[str, str]] = {
        "hook": "which column, of several",
        "without": "token ids that give no row, such as [0, 50256]",
    }

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        try:
            return bool(_columns(_features(folder)))
        except UnweaveError:
            return False

    def _open(self) -> None:
        found = _columns(_features(self.folder))
        hook = self.given.get("hook", str)
        if hook is None and len(found) > 1:
            raise UnweaveError(f"{self.folder} holds several sites: say which, with hook= one of {', '.join(found)}")
        self.hook = hook or next(iter(found))
        if self.hook not in found:
            raise UnweaveError(f"{self.folder} holds no column {self.hook!r}: it holds {', '.join(found)}")
        (self.context_size, self.width), self.dtype = found[self.hook]
        check_size(self.folder, f"contexts in {self.hook!r}", self.context_size, self.width)
        runner = read_settings(self.folder / _RUNNER) if (self.folder / _RUNNER).is_file() else Settings({}, _RUNNER)
        self.model, self.site = runner.get("model_name", str), site_of_hook(self.hook)
        self.data = {"hook": self.hook, "name": runner.get("dataset_path", str)}
        self.data = {key: value for key, value in self.data.items() if value is not None}
        without = self.given.get("without", list, [])
        if not all(type(token) is int for token in without):
            raise UnweaveError(f"without: expected token ids such as [0, 50256], found {str(without)[:80]}")
        self.without = torch.tensor(without, dtype=torch.int64)
        there = all(_TOKENS in _schema(path)[0] for path in self._files())
        self.tokens = "kept" if there else "unknown"
        if len(self.without) and not there:
            raise UnweaveError(f"{self.folder} holds no token ids: leave without= out")
        self.n_rows = sum(n for _, n in self._counts) * self.context_size

    def _files(self) -> list[Path]:
        return _data_files(self.folder)

    @cached_property
    def _counts(self) -> list[tuple[Path, int]]:
        return [(path, sum(n for n, _ in _record_batches(path, [self.hook]))) for path in self._files()]

    def _stretches(self) -> Iterator[tuple[Path, int, int]]:
        first = 0
        for path, n in self._counts:
            yield path, n, first
            first += n

    def _read(self, path: Path, n: int, first: int, skip: int) -> Iterator[ActivationBatch]:
        # Pieces are cut across the file's own record batches, so that where a piece starts does not hang on them.
        columns = [self.hook, *([_TOKENS] if self.tokens == "kept" else [])]
        waiting: list[tuple[Tensor, Tensor | None]] = []
        held = at = 0
        start = skip * self.per_batch
        for size, batch in _record_batches(path, columns):
            if at + size > start:
                whole = batch()
                for a in range(max(0, start - at), size, self.per_batch):
                    piece = whole.slice(a, self.per_batch)
                    waiting.append(self._tensors(path, piece, at + a))
                    held += len(piece)
                    while held >= self.per_batch:
                        yield self._batch(waiting, self.per_batch, first + start)
                        start, held = start + self.per_batch, held - self.per_batch
            at += size
        if held:
            yield self._batch(waiting, held, first + start)

    def _tensors(self, path: Path, piece: Any, first: int) -> tuple[Tensor, Tensor | None]:
        rows = _array(piece.column(self.hook), (self.context_size, self.width), f"{path}, {self.hook!r}", first)
        if self.tokens != "kept":
            return rows, None
        tokens = _array(piece.column(_TOKENS), (self.context_size,), f"{path}, {_TOKENS!r}", first)
        return rows, check_tokens(path, tokens)

    def _batch(self, waiting: list[tuple[Tensor, Tensor | None]], n: int, first: int) -> ActivationBatch:
        """The first ``n`` contexts that wait, taken away."""
        rows = torch.cat([rows for rows, _ in waiting])
        ids = [tokens for _, tokens in waiting if tokens is not None]
        tokens = torch.cat(ids) if ids else None
        waiting[:] = [(rows[n:], None if tokens is None else tokens[n:])] if len(rows) > n else []
        tokens = None if tokens is None else tokens[:n]
        keep = None if tokens is None or not len(self.without) else ~torch.isin(tokens, self.without)
        return contexts(rows[:n], tokens, first, keep)


def _data_files(folder: Path) -> list[Path]:
    """The Arrow files a ``datasets`` folder names, or the parquet files of one that was on the hub."""
    if not (folder / _STATE).is_file():
        return [p for place in (folder, folder / "data") for p in sorted(place.glob("*.parquet"))]
    state = read_settings(folder / _STATE)
    if state.get("_indices_data_files", object) or state.get("_indices_files", object):
        raise UnweaveError(f"{folder} was saved with an index of its rows: call flatten_indices() and save it again")
    files = []
    for entry in state.need("_data_files", list):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UnweaveError(f"{folder / _STATE}: expected the names of files beside it, found {str(entry)[:80]!r}")
        if not (folder / name).is_file():
            raise UnweaveError(f"{folder / name} is missing: copy the folder again, with all its .arrow files")
        files.append(folder / name)
    if not files:
        raise UnweaveError(f"{folder / _STATE} names no file: the cache is empty, or was not finished")
    return files


def _features(folder: Path) -> Settings:
    """The columns as ``datasets`` describes them."""
    if (folder / _INFO).is_file() and (folder / _STATE).is_file():
        return read_settings(folder / _INFO).section("features")
    for path in _data_files(folder) if not (folder / _STATE).is_file() else []:
        try:
            info = json.loads(_schema(path)[1])
        except (ValueError, RecursionError):
            info = None
        return Settings(info if isinstance(info, dict) else {}, str(path)).section("info").section("features")
    raise UnweaveError(f"{folder} holds no dataset: found {', '.join(names_in(folder)[:8]) or 'no files'}")


def _columns(features: Settings) -> dict[str, tuple[tuple[int, int], str]]:
    """Shape and dtype of the columns that hold contexts of rows."""
    found = {}
    for name, entry in features.items():
        if isinstance(entry, dict) and entry.get("_type") == "Array2D":
            shape, dtype = entry.get("shape"), entry.get("dtype")
            if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)):
                raise UnweaveError(f"{features.origin}: expected {name!r} to have a shape (context, d), found {shape}")
            if dtype not in ("float16", "float32", "float64"):
                raise UnweaveError(f"{features.origin}: expected {name!r} to hold floats, found {str(dtype)[:40]!r}")
            found[name] = ((shape[0], shape[1]), dtype)
    if not found:
        raise UnweaveError(f"{features.origin}: no column holds contexts of activations (Array2D)")
    return found


def _schema(path: Path) -> tuple[list[str], bytes]:
    """The names of a file's columns, and what ``datasets`` says of them."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            schema = parquet.read_schema(path)
        else:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                schema = stream.schema
        return schema.names, (schema.metadata or {}).get(b"huggingface", b"{}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _record_batches(path: Path, columns: list[str]) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The record batches of a file in order: the number of contexts, and a function that gives them, checked."""
    import pyarrow as pa
    from pyarrow import parquet

    missing = set(columns) - set(_schema(path)[0])
    if missing:
        raise UnweaveError(f"{path}: expected a column {sorted(missing)[0]!r}: its file is of another cache")

    def checked(read: Callable[[], Any]) -> Any:
        try:
            found = read().select(columns)
            found.validate(full=True)  # offsets that lead out of a buffer would be read all the same
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(path, error) from None
        return found

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path, memory_map=True) as file:
                for group in range(file.num_row_groups):
                    n = file.metadata.row_group(group).num_rows
                    yield n, partial(checked, partial(file.read_row_group, group, columns))
            return
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - len(_END)))
            if file.read() != _END:
                raise UnweaveError(f"{path} does not end as an Arrow stream does: it is cut short, copy it again")
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                yield batch.num_rows, partial(checked, lambda batch=batch: batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _array(column: Any, shape: tuple[int, ...], what: str, first: int) -> Tensor:
    """``(n, *shape)`` out of a column of nested lists, a copy."""
    import pyarrow as pa
    from pyarrow.compute import call_function

    n = len(column)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.ExtensionArray):  # where `datasets` is imported, its own type is known
        column = column.storage
    for size in shape:
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise UnweaveError(f"{what}: expected lists within lists, found {kind}")
        lengths = call_function("unique", [call_function("list_value_length", [column])]).to_pylist()
        if lengths not in ([size], []):
            raise UnweaveError(
                f"{what}: expected every list to hold {size}, found {lengths[:4]} (contexts {first} and on)"
            )
        column = column.flatten()
    if column.null_count or not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise UnweaveError(f"{what}: expected numbers without gaps, found {column.type} with {column.null_count} empty")
    return torch.from_numpy(np.array(column.to_numpy(zero_copy_only=False)).reshape(n, *shape))


def _damaged(path: Path, error: Exception) -> UnweaveError:
    return UnweaveError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}): it is damaged, copy it again")
