"""Harvest: run a source until a store has enough rows. Kill it at any time and run it again."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.activations._checks import check_batch
from unweave.activations._manifest import load_manifest, plain_json
from unweave.activations._shard import ShardBuilder
from unweave.activations.store import ActivationStore
from unweave.errors import UnweaveError
from unweave.files import only_writer
from unweave.progress import track

if TYPE_CHECKING:
    from unweave.sources._base import Source


def harvest(
    source: Source,
    folder: str | Path,
    *,
    n_rows: int,
    provenance_extra: Mapping[str, Any] | None = None,
    shard_rows: int | None = None,
) -> ActivationStore:
    """Fill a store in ``folder`` with at least ``n_rows`` rows of a source, to the end of a batch.

    Where the folder already holds an unfinished store of the same source, the harvest goes on behind its last
    finished shard, and the result is bit-identical to that of a run never interrupted. A store that has its rows is
    returned at once; asking for more makes it grow; a missing or cut shard is made anew. A source that ends early
    gives a complete store with the rows there were.

    Args:
        source: see :class:`unweave.sources.Source`.
        folder: of the store.
        n_rows: how many rows are wanted in all.
        provenance_extra: further JSON-able keys that become part of the store's provenance.
        shard_rows: rows to a shard of a new store (default: 65,536, fewer for very wide rows).

    Raises:
        UnweaveError: when the folder holds other activations (naming what differs), when rows hold NaN or infinity,
            when the disk is full, or when another process is writing there. Finished shards are never lost.
    """
    if n_rows < 1:
        raise UnweaveError(f"harvest: expected n_rows of at least 1, found {n_rows}")
    folder = Path(folder)
    provenance = plain_json({**source.provenance, **(provenance_extra or {})})
    with only_writer(folder):
        store = _existing(folder, source, provenance)
        if store is not None:
            _repair(store, source)
            if store.complete and store.n_rows >= n_rows:
                return store
        have = store.n_rows if store is not None else 0
        title = f"harvest (after the {have:,} rows kept)" if have else "harvest"
        with track(max(0, n_rows - have), title) as progress:
            # Without enough rows the source goes on behind the last finished shard; what it gives is all there is.
            batches = source.batches(skip=store.n_batches if store is not None else 0) if have < n_rows else ()
            for batch in batches:
                if store is None:
                    d_out = None if batch.target is batch.input else batch.target.shape[1]
                    store = ActivationStore.create(
                        folder, provenance, batch.input.shape[1], d_out, batch.input.dtype, shard_rows=shard_rows
                    )
                store.append(batch)
                progress.advance(batch.n_rows)
                if store.n_rows + store.n_pending_rows >= n_rows:
                    break
        if store is None or store.n_rows + store.n_pending_rows == 0:
            raise UnweaveError("the source gave no rows: is its data empty, or was every row filtered out?")
        store.finish()
        return store


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
