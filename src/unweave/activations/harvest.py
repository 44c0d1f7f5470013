"""Harvest: run a source until a store, or one for each of several sites, has enough rows. Kill it and run it again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from unweave.activations._checks import check_batch
from unweave.activations._manifest import as_stored, load_manifest, plain_json
from unweave.activations._shard import ShardBuilder
from unweave.activations.store import ActivationStore
from unweave.errors import UnweaveError, near_names
from unweave.files import only_writer
from unweave.progress import track

if TYPE_CHECKING:
    from unweave.batch import ActivationBatch
    from unweave.sources._base import Source, SourceGroup

Folders = Mapping[str, str | Path]


@overload
def harvest(
    source: Source | ActivationStore,
    folder: str | Path,
    *,
    n_rows: int,
    dtype: Literal["int8"] | None = None,
    provenance_extra: Mapping[str, Any] | None = None,
    shard_rows: int | None = None,
) -> ActivationStore: ...


@overload
def harvest(
    source: SourceGroup,
    folder: Folders,
    *,
    n_rows: int,
    dtype: Literal["int8"] | None = None,
    provenance_extra: Mapping[str, Any] | None = None,
    shard_rows: int | None = None,
) -> dict[str, ActivationStore]: ...


def harvest(
    source: Source | ActivationStore | SourceGroup,
    folder: str | Path | Folders,
    *,
    n_rows: int,
    dtype: Literal["int8"] | None = None,
    provenance_extra: Mapping[str, Any] | None = None,
    shard_rows: int | None = None,
) -> ActivationStore | dict[str, ActivationStore]:
    """Fill a store in ``folder`` with at least ``n_rows`` rows of a source, to the end of a batch.

    Where the folder already holds an unfinished store of the same source, the harvest goes on behind its last
    finished shard, and the result is bit-identical to that of a run never interrupted. A store that has its rows is
    returned at once; asking for more makes it grow; a missing or cut shard is made anew. A source that ends early
    gives a complete store with the rows there were.

    Several sites from one pass of the model: give a :class:`~unweave.sources.SourceGroup` and a folder for each of
    its names (or some). Every store is, byte for byte, what harvesting its site alone would have made, so each knows
    by itself how far it came: after a kill between the writes of two of them, the batches one already has are made
    again for the others and left out there. Stores that have their rows cost nothing, so sites can be added later.
    A shard of each site (at most about half a GB) is held in memory.

    Args:
        source: see :class:`unweave.sources.Source`, or a group of them.
        folder: of the store; for a group ``{name: folder}``.
        n_rows: how many rows are wanted in all (in each store).
        dtype: None keeps the rows as the source gives them; "int8" halves bfloat16 (see
            :meth:`ActivationStore.create`).
        provenance_extra: further JSON-able keys that become part of the store's provenance; for a group such a
            mapping for each name.
        shard_rows: rows to a shard of a new store (default: 65,536, fewer for very wide rows).

    Returns:
        The store; for a group the stores by name.

    Raises:
        UnweaveError: when a folder holds other activations (naming what differs), when rows hold NaN or infinity,
            when the disk is full, or when another process is writing there. Finished shards are never lost.
    """
    if n_rows < 1:
        raise UnweaveError(f"harvest: expected n_rows of at least 1, found {n_rows}")
    if dtype not in (None, "int8"):
        raise UnweaveError(f"harvest: dtype is 'int8', or None to keep the source's own, found {dtype!r}")
    group, folders, extra = _grouped(source, folder, provenance_extra)
    with ExitStack() as held:
        for path in folders.values():
            held.enter_context(only_writer(path))
        fillings = {
            name: _Filling(name, group.sources[name], path, n_rows, dtype, extra.get(name, {}), shard_rows)
            for name, path in folders.items()
        }
        _fill(group, fillings)
        stores = {name: filling.finish() for name, filling in fillings.items()}
    return stores if isinstance(folder, Mapping) else stores[""]


def _fill(group: Any, fillings: dict[str, _Filling]) -> None:
    waiting = {name: filling for name, filling in fillings.items() if filling.n_missing}
    kept = sum(filling.n_rows for filling in waiting.values())
    title = f"harvest (after the {kept:,} rows kept)" if kept else "harvest"
    with track(sum(filling.n_missing for filling in waiting.values()), title) as progress:
        if not waiting:
            return
        first = min(filling.n_batches for filling in waiting.values())
        for number, batches in enumerate(group.batches(skip=first, names=list(waiting)), first):
            for name, filling in list(waiting.items()):
                if number < filling.n_batches:
                    continue  # a kill left this store ahead of another
                filling.append(batches[name])
                progress.advance(batches[name].n_rows)
                if not filling.n_missing:
                    waiting.pop(name).finish()
            if not waiting:
                return


class _Filling:
    """One store on its way to ``wanted`` rows. What it still lacks decides what is run, so there is no other cursor."""

    def __init__(
        self,
        name: str,
        source: Any,
        folder: Path,
        wanted: int,
        dtype: str | None,
        extra: Mapping[str, Any],
        shard_rows: int | None,
    ) -> None:
        self.name, self.folder, self.wanted, self.dtype, self.shard_rows = name, folder, wanted, dtype, shard_rows
        self.provenance = plain_json(as_stored({**source.provenance, **extra}, dtype or ""))
        self.store = _existing(folder, source, self.provenance)
        if self.store is not None:
            _repair(self.store, source)

    @property
    def n_rows(self) -> int:
        return 0 if self.store is None else self.store.n_rows + self.store.n_pending_rows

    @property
    def n_batches(self) -> int:
        return 0 if self.store is None else self.store.n_batches + self.store.n_pending_batches

    @property
    def n_missing(self) -> int:
        # Without enough rows the source goes on behind the last finished shard; what it gives is all there is.
        return max(0, self.wanted - self.n_rows)

    def append(self, batch: ActivationBatch) -> None:
        if self.store is None:
            d_out = None if batch.target is batch.input else batch.target.shape[1]
            self.store = ActivationStore.create(
                self.folder,
                self.provenance,
                batch.input.shape[1],
                d_out,
                self.dtype or batch.input.dtype,
                rows_dtype=batch.input.dtype if self.dtype else None,
                d_side=None if batch.side is None else batch.side.shape[1],
                side_dtype=None if batch.side is None else batch.side.dtype,
                shard_rows=self.shard_rows,
            )
        try:
            self.store.append(batch)
        except UnweaveError as error:
            if self.name:
                raise UnweaveError(f"{self.name}: {error}") from None
            raise

    def finish(self) -> ActivationStore:
        if self.store is None or self.n_rows == 0:
            where = f"{self.name}: " if self.name else ""
            raise UnweaveError(f"{where}the source gave no rows: is its data empty, or was every row filtered out?")
        if not self.store.complete or self.store.n_pending_batches:
            self.store.finish()
        return self.store


class _Alone:
    """One source as a group of one."""

    def __init__(self, source: Any) -> None:
        self.sources = {"": source}

    def batches(self, skip: int, names: Collection[str]) -> Iterator[dict[str, ActivationBatch]]:
        return ({"": batch} for batch in self.sources[""].batches(skip=skip))


def _grouped(source: Any, folder: Any, extra: Mapping[str, Any] | None) -> tuple[Any, dict[str, Path], Any]:
    """The source as a group, the folder of each of its names, and the extra provenance of each."""
    if not isinstance(folder, Mapping):
        if hasattr(source, "sources"):
            raise UnweaveError(f"{source!r} gives rows of several sites: give a folder for each, {{name: folder}}")
        return _Alone(source), {"": Path(folder)}, {"": extra or {}}
    if not hasattr(source, "sources"):
        raise UnweaveError(f"{source!r} gives rows of one site: give one folder, not {len(folder)} by name")
    if not folder:
        raise UnweaveError("harvest: expected a folder for at least one site, found none")
    for name in [*folder, *(extra or {})]:
        if name not in source.sources:
            raise UnweaveError(f"harvest: no {name!r} in {source!r}: {near_names(name, source.sources)}")
    folders = {name: Path(path) for name, path in folder.items()}
    if len({path.resolve() for path in folders.values()}) < len(folders):
        raise UnweaveError("harvest: expected a folder of its own for each site, found one twice")
    return source, folders, extra or {}


def _existing(folder: Path, source: Source, provenance: dict[str, Any]) -> ActivationStore | None:
    if not (folder / "manifest.json").exists():
        return None
    # Not ActivationStore.open: a damaged shard is repaired here, not refused.
    store = ActivationStore(folder, load_manifest(folder))
    try:
        store.verify_against(provenance, d_in=source.d_in, d_out=source.d_out)
    except UnweaveError as error:
        raise UnweaveError(
            f"{error}. (Expected: what this source gives.) Choose another folder, or delete this store"
        ) from None
    return store


def _repair(store: ActivationStore, source: Source) -> None:
    """Make every missing or cut shard anew from its own batches; the others are not touched."""
    for index, _ in list(store.damaged()):
        entry, before = store.manifest.shards[index], store.manifest.shards[:index]
        first, n_items = (sum(getattr(shard, name) for shard in before) for name in ("n_batches", "n_items"))
        shard = ShardBuilder()
        with track(entry.n_rows, f"repair {entry.file}") as progress:
            for batch in islice(source.batches(skip=first), entry.n_batches):
                check_batch(batch, store.manifest, n_items + shard.n_items, first + len(shard.batches))
                shard.add(batch)
                progress.advance(batch.n_rows)
        n_tokens = sum(batch.items.n_tokens for batch in shard.batches)
        made = (len(shard.batches), shard.n_items, n_tokens)
        if made != (entry.n_batches, entry.n_items, entry.n_tokens):
            raise UnweaveError(
                f"cannot repair {store.folder / entry.file}: expected {entry.n_batches} batches with {entry.n_items} "
                f"items and {entry.n_tokens} tokens, the source now gives {made[0]}, {made[1]} and {made[2]}. Has the "
                "data changed? The other shards are kept"
            )
        store.put_shard(index, shard, complete=store.complete)
