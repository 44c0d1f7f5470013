"""ActivationStore: a folder of safetensors shards and a manifest. docs/activation-store.md explains the format."""

from __future__ import annotations

import html
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.activations._checks import check_batch
from unweave.activations._describe import describe, dtype_words, size_words
from unweave.activations._manifest import (
    DTYPES,
    FORMAT,
    FORMAT_WITH_SIDE,
    Manifest,
    as_stored,
    default_shard_rows,
    differences,
    dtype_name,
    load_manifest,
    plain_json,
    rows_dtype_name,
    save_manifest,
    shard_name,
)
from unweave.activations._shard import ShardBuilder, ShardPool, ShardReader, how_to_repair
from unweave.batch import ActivationBatch, Items, Meta
from unweave.errors import UnweaveError
from unweave.files import sha256_file
from unweave.progress import track

Rows = slice | Tensor | Sequence[int]


class ActivationStore:
    """Activation rows on disk, with the items (contexts) they came from.

    Made by :meth:`create` or :func:`harvest`, read again by :meth:`open`. Counts and reads cover finished shards;
    rows appended since the last one are pending, and are lost if the process dies. ``store[a:b]`` is an
    :class:`ActivationBatch`: rows ``a`` to ``b`` with the whole items they came from. ``batches()`` gives back
    exactly what was appended, so a store can stand in for the source it was harvested from.

    Raises:
        UnweaveError: for a missing, damaged or foreign folder; for rows that do not fit or are not finite.
    """

    __iter__ = None  # rows are read in slices and batches by batches(); a row at a time would be slow by accident

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._pool = ShardPool(folder)
        self._pending = ShardBuilder()
        self._writing = False

    @classmethod
    def create(
        cls,
        folder: str | Path,
        provenance: Mapping[str, Any],
        d_in: int,
        d_out: int | None = None,
        dtype: str | torch.dtype = "bfloat16",
        *,
        rows_dtype: str | torch.dtype | None = None,
        d_side: int | None = None,
        side_dtype: str | torch.dtype | None = None,
        shard_rows: int | None = None,
    ) -> ActivationStore:
        """A new, empty store.

        Args:
            folder: made if it is not there; must not hold a store yet.
            provenance: JSON-able, everything the rows depend on.
            d_in: width of the input rows. d_out: width of the targets; None when the target is the input.
            dtype: of the rows; nothing is converted on the way. "int8" alone halves bfloat16: rows are kept as 8-bit
                integers, with a scale for each row and, in each shard, for each channel, and are read back as
                ``rows_dtype``. What is lost depends on the model; ``benchmarks/int8_store.py`` measures it.
            rows_dtype: of the rows given to and read from an int8 store: bfloat16 (default), float16 or float32.
            d_side: width of the side inputs; None without any. side_dtype: of the side inputs, which int8 leaves as
                they are; that of the rows when None.
            shard_rows: a shard is closed after the batch that brings it to this many rows (65,536, or fewer for
                very wide rows).
        """
        folder = Path(folder)
        if (folder / "manifest.json").exists():
            raise UnweaveError(f"{folder} already holds an activation store: open it, or choose another folder")
        if any(folder.glob("shard-*.safetensors")):
            raise UnweaveError(f"{folder} holds shards but no manifest.json: delete them or choose another folder")
        name = dtype_name(dtype)
        rows_name = rows_dtype_name(name, rows_dtype)
        side_name = None if d_side is None else dtype_name(side_dtype or rows_name or name)
        row_bytes = (d_in + (d_out or 0)) * DTYPES[rows_name or name].itemsize  # as a writer holds them
        row_bytes += d_side * DTYPES[side_name].itemsize if d_side is not None and side_name in DTYPES else 0
        manifest = Manifest(
            format=FORMAT if d_side is None else FORMAT_WITH_SIDE,
            provenance=plain_json(as_stored(provenance, name)),
            d_in=d_in,
            d_out=d_out,
            dtype=name,  # pyright: ignore[reportArgumentType]
            rows_dtype=rows_name,  # pyright: ignore[reportArgumentType]
            d_side=d_side,
            side_dtype=side_name,  # pyright: ignore[reportArgumentType]
            shard_rows=shard_rows or default_shard_rows(max(1, row_bytes)),
        )
        save_manifest(folder, manifest)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """An existing store, finished or not. Checks the manifest, and that every shard is there in full length.

        Raises:
            UnweaveError: naming the first shard that is missing or cut, and what to do.
        """
        folder = Path(folder)
        store = cls(folder, load_manifest(folder))
        for i, found in store.damaged():
            raise UnweaveError(f"{store._path(i)}: {found}. {how_to_repair(store._path(i))}")
        return store

    # ---- facts ------------------------------------------------------------------------------------------------

    @property
    def provenance(self) -> dict[str, Any]:
        return self.manifest.provenance

    @property
    def n_rows(self) -> int:
        return self.manifest.n_rows

    @property
    def n_items(self) -> int:
        return self.manifest.n_items

    @property
    def n_tokens(self) -> int:
        return self.manifest.n_tokens

    @property
    def n_batches(self) -> int:
        return self.manifest.n_batches

    @property
    def n_shards(self) -> int:
        return len(self.manifest.shards)

    @property
    def n_pending_rows(self) -> int:
        """Rows appended but not yet in a finished shard."""
        return self._pending.n_rows

    @property
    def n_pending_batches(self) -> int:
        """Batches appended but not yet in a finished shard."""
        return len(self._pending.batches)

    @property
    def d_in(self) -> int:
        return self.manifest.d_in

    @property
    def d_out(self) -> int:
        """Width of the targets (``d_in`` when the target is the input)."""
        return self.manifest.d_out or self.manifest.d_in

    @property
    def d_side(self) -> int | None:
        """Width of the side inputs; None where there are none."""
        return self.manifest.d_side

    @property
    def side_dtype(self) -> torch.dtype | None:
        """Of the side inputs; None where there are none."""
        return None if self.manifest.side_dtype is None else DTYPES[self.manifest.side_dtype]

    @property
    def has_target(self) -> bool:
        """Whether targets are stored apart from the inputs."""
        return self.manifest.d_out is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as they are read (of an int8 store: bfloat16, or what it was made for)."""
        return self.manifest.read_dtype

    @property
    def complete(self) -> bool:
        return self.manifest.complete

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.manifest.shards)

    def __len__(self) -> int:
        return self.n_rows

    def __repr__(self) -> str:
        width = f"{self.d_in} -> {self.d_out}" if self.has_target else str(self.d_in)
        width += f" (+ {self.d_side} side)" if self.d_side else ""
        state = "complete" if self.complete else "unfinished"
        pending = f" + {self.n_pending_rows:,} pending" if self.n_pending_rows else ""
        where = self.provenance.get("site")
        return (
            f"ActivationStore({str(self.folder)!r}: {self.n_rows:,} rows{pending} x {width} {dtype_words(self)}, "
            f"{self.n_items:,} items, {self.n_shards} shards, {size_words(self.bytes)}, {state}"
            f"{f', site {where}' if where else ''})"
        )

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self.describe())
        return f"<table>{cells}</table>"

    def describe(self) -> list[tuple[str, str]]:
        """The store in words, as (what, value) pairs for a table."""
        return describe(self)

    def verify_against(
        self, provenance: Mapping[str, Any] | None = None, *, d_in: int | None = None, d_out: int | None = None
    ) -> None:
        """Refuse a store that is not what the caller works with.

        Raises:
            UnweaveError: naming what differs, what was expected and what the store holds.
        """
        wrong = list(differences(plain_json(provenance), self.provenance)) if provenance is not None else []
        for name, expected, found in (("d_in", d_in, self.d_in), ("d_out", d_out, self.d_out)):
            if expected is not None and expected != found:
                wrong.append(f"{name}: expected {expected}, found {found}")
        if wrong:
            more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise UnweaveError(f"{self.folder} holds other activations: {'; '.join(sorted(wrong)[:4])}{more}")

    # ---- writing ----------------------------------------------------------------------------------------------

    def append(self, batch: ActivationBatch) -> None:
        """Add a batch; when the shard has its rows, write it out.

        Raises:
            UnweaveError: when the batch does not fit the store or holds NaN or infinity (naming item, document and
                position of the first), or the disk is full. What was finished stays as it is.
        """
        self._clean()
        n_items = self.n_items + self._pending.n_items
        check_batch(batch, self.manifest, n_items, self.n_batches + self.n_pending_batches)
        self._pending.add(batch)
        if self._pending.n_rows >= self.manifest.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Close the current shard, if it has anything, and enter it in the manifest."""
        self._flush(complete=False)

    def finish(self) -> None:
        """Close the current shard and mark the store complete. Appending again later makes it grow."""
        self._flush(complete=True)
        if not self.complete:
            self._clean()
            manifest = self.manifest.replace(complete=True)
            save_manifest(self.folder, manifest)
            self.manifest = manifest

    def _flush(self, complete: bool) -> None:
        if self._pending.batches:
            self.put_shard(self.n_shards, self._pending, complete=complete)
            self._pending = ShardBuilder()

    def put_shard(self, index: int, shard: ShardBuilder, *, complete: bool) -> None:
        """Write shard ``index``, new or in place of a damaged one: the file first, then the manifest naming it."""
        self._pool.clear()
        entry = shard.write(self.folder, shard_name(index), self.manifest)
        manifest = self.manifest.with_shard(index, entry, complete=complete)
        save_manifest(self.folder, manifest)
        self.manifest = manifest

    def _clean(self) -> None:
        """Once, before writing: delete what a killed writer left, temporary files and a shard outside the manifest."""
        if self._writing:
            return
        self._writing = True
        known = {shard.file for shard in self.manifest.shards}
        for pattern in (".shard-*.tmp", ".manifest.json.*.tmp", "shard-[0-9]*.safetensors"):
            for path in self.folder.glob(pattern):
                if path.name not in known:
                    path.unlink(missing_ok=True)

    # ---- reading ----------------------------------------------------------------------------------------------

    def shard(self, index: int) -> ShardReader:
        """The reader of one shard (for code that walks shards itself, as RowStream does)."""
        return self._pool.get(self.manifest.shards[index], self.manifest)

    @property
    def shard_sizes(self) -> list[int]:
        """Rows in each shard."""
        return [shard.n_rows for shard in self.manifest.shards]

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        """The batches as they were appended, from number ``skip`` on."""
        for i, entry in enumerate(self.manifest.shards):
            if skip < entry.n_batches:
                for k in range(skip, entry.n_batches):
                    yield self.shard(i).batch(k)
            skip = max(0, skip - entry.n_batches)

    def rows(self, which: Rows) -> Tensor:
        """``(n, d_in)`` input rows, a copy: a slice, or row numbers in any order."""
        n, pieces = self._locate(which)
        out = torch.empty(n, self.d_in, dtype=self.dtype)
        for reader, here, there in pieces:
            out[there] = reader.input(here)
        return out

    def targets(self, which: Rows) -> Tensor:
        """``(n, d_out)`` target rows, a copy."""
        n, pieces = self._locate(which)
        out = torch.empty(n, self.d_out, dtype=self.dtype)
        for reader, here, there in pieces:
            out[there] = reader.target(here)
        return out

    def sides(self, which: Rows) -> Tensor | None:
        """``(n, d_side)`` side inputs, a copy; None where the store has none."""
        if self.d_side is None:
            return None
        n, pieces = self._locate(which)
        out = torch.empty(n, self.d_side, dtype=self.side_dtype)
        for reader, here, there in pieces:
            found = reader.side(here)
            assert found is not None
            out[there] = found
        return out

    def meta(self, which: Rows) -> Meta:
        """Document, position and token of rows."""
        n, pieces = self._locate(which)
        meta = Meta(
            torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
        )
        for reader, here, there in pieces:
            found = reader.meta(here)
            meta.document[there], meta.position[there], meta.token[there] = found.document, found.position, found.token
        return meta

    @property
    def items(self) -> Items:
        """All items of the store (its tokens are read into memory: 4 bytes each)."""
        return Items.concatenate([self.shard(i).items for i in range(self.n_shards)])

    def __getitem__(self, which: slice | int) -> ActivationBatch:
        """Rows of a slice as one batch, with the whole items they came from; ``store[i]`` is ``store[i:i + 1]``."""
        if not isinstance(which, slice):
            row = operator.index(which)
            if not -self.n_rows <= row < self.n_rows:
                raise self._outside(row)
            which = slice(row, row + 1 or None)
        n, pieces = self._locate(which)
        if n == 0:
            rows = torch.empty(0, self.d_in, dtype=self.dtype)
            target = torch.empty(0, self.d_out, dtype=self.dtype) if self.has_target else None
            return ActivationBatch.of_rows(rows, target, side=self.sides(which))
        if not all(isinstance(here, slice) for _, here, _ in pieces):
            raise UnweaveError("a store is sliced in runs (step 1); for scattered rows use store.rows(indices)")
        return ActivationBatch.concatenate(
            [reader.batch_of_rows(here) for reader, here, _ in pieces if isinstance(here, slice)]
        )

    def _locate(self, which: Rows) -> tuple[int, list[tuple[ShardReader, slice | Tensor, slice | Tensor]]]:
        """How many rows, and for each shard concerned: its reader, rows within it, their places in the result."""
        starts = torch.tensor([0, *self.shard_sizes]).cumsum(0)
        pieces: list[tuple[ShardReader, slice | Tensor, slice | Tensor]] = []
        if isinstance(which, slice):
            first, stop, step = which.indices(self.n_rows)
            if step == 1:
                for i, size in enumerate(self.shard_sizes):
                    base = int(starts[i])
                    a, b = max(first, base), min(stop, base + size)
                    if a < b:
                        pieces.append((self.shard(i), slice(a - base, b - base), slice(a - first, b - first)))
                return max(0, stop - first), pieces
            which = range(first, stop, step)
        rows = torch.as_tensor(which) if len(which) else torch.zeros(0, dtype=torch.long)
        if rows.ndim != 1 or rows.dtype == torch.bool or rows.is_floating_point():
            raise UnweaveError(
                f"expected a slice or a list of row numbers, found {rows.dtype} of shape {tuple(rows.shape)}"
            )
        rows = rows.long()
        bad = rows[(rows < -self.n_rows) | (rows >= self.n_rows)]
        if len(bad):
            raise self._outside(int(bad[0]))
        rows = torch.where(rows < 0, rows + self.n_rows, rows)
        shards = torch.searchsorted(starts, rows, right=True) - 1
        for i in shards.unique().tolist():
            places = (shards == i).nonzero().flatten()
            pieces.append((self.shard(i), rows[places] - starts[i], places))
        return len(rows), pieces

    def same_document_rate(self) -> float | None:
        """The share of pairs of distinct rows of the whole store that come from the same document.

        This is what batches drawn from a perfect shuffle of the store would show on average. None below two rows.
        """
        if self.n_rows < 2:
            return None
        readers = [self.shard(i) for i in range(self.n_shards)]
        documents, inverse = torch.cat([r.items.document for r in readers]).unique(return_inverse=True)
        rows = torch.cat([r.rows_per_item for r in readers])
        counts = torch.zeros(len(documents), dtype=torch.float64).index_add_(0, inverse, rows.double())
        return float((counts * (counts - 1)).sum()) / (self.n_rows * (self.n_rows - 1))

    # ---- health -----------------------------------------------------------------------------------------------

    def damaged(self) -> Iterator[tuple[int, str]]:
        """Shards that are missing or of the wrong length, with what was found: a glance at the folder, no reading."""
        for i, entry in enumerate(self.manifest.shards):
            path = self._path(i)
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                yield i, "the shard is missing"
            elif size != entry.bytes:
                yield i, f"expected {entry.bytes:,} bytes, found {size:,}: the shard is cut short or was replaced"

    def verify(self, progress: bool = True) -> None:
        """Read every byte: lengths, SHA-256 sums, headers, and that rows, items and batches fit together.

        Raises:
            UnweaveError: naming the first damaged shard, and what to do.
        """
        for i, found in self.damaged():
            raise UnweaveError(f"{self._path(i)}: {found}. {how_to_repair(self._path(i))}")
        self._pool.clear()
        with track(self.bytes if progress else None, "verify", unit="bytes") as bar:
            for i, entry in enumerate(self.manifest.shards):
                path = self._path(i)
                found = sha256_file(path, bar.advance if progress else None)
                if found != entry.sha256:
                    raise UnweaveError(
                        f"{path} is damaged: expected SHA-256 {entry.sha256[:16]}..., found {found[:16]}.... "
                        f"{how_to_repair(path)}"
                    )
                self.shard(i).check_contents()

    def _path(self, index: int) -> Path:
        return self.folder / shard_name(index)

    def _outside(self, row: int) -> UnweaveError:
        return UnweaveError(f"row {row} is outside the store, which holds {self.n_rows:,} rows")
