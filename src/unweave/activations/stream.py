"""RowStream: rows for training, from a store in random blocks or from a live source in its order."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unweave.activations._readahead import ReadAhead, cores
from unweave.activations._shard import ShardPool
from unweave.activations.store import ActivationStore
from unweave.errors import UnweaveError

if TYPE_CHECKING:
    from unweave.sources._base import Source

_GROUP_ROWS, _GROUP_BYTES = 2048, 1 << 22  # what the reading thread hands over at once, and at most twice ahead


class Chunk(NamedTuple):
    """Rows read from a stream. ``target`` is the very tensor ``input`` when the data has no separate target."""

    input: Tensor  # (n, d_in)
    target: Tensor  # (n, d_out)
    document: Tensor  # (n,) int64, on the CPU
    side: Tensor | None = None  # (n, d_side); None when the data has no side inputs


class _Group(NamedTuple):
    """Pieces (blocks of a store, a batch of a source) one after another in one chunk, and where each of them ends."""

    rows: Chunk
    ends: list[int]


class RowStream:
    """An endless run of rows with an exact, small state.

    Over a store, each epoch visits blocks of ``block_rows`` consecutive rows in a random order of its own (drawn from
    seed and epoch), every row exactly once; the last block of a shard may be shorter. One row at a time would be some
    hundred times slower, and a :class:`ShuffleRing` mixes the blocks. Over a source, its batches come in order and
    then again from the start (the source itself shuffles its documents).

    Rows of a store are read a few thousand ahead by one thread, so that the disk (and the arithmetic of int8 rows)
    costs the caller nothing; what a state counts is what was handed out. A source is run where it is called.

    Args:
        data: what to read. seed: of the order of blocks.
        epochs_infinite: when false, the stream ends after one epoch: ``read`` then returns fewer rows, finally none.
        block_rows: rows read from one place.
        read_ahead: whether a store is read ahead; None: where there is a second core.

    Raises:
        UnweaveError: for data without rows.
    """

    def __init__(
        self,
        data: ActivationStore | Source,
        *,
        seed: int = 0,
        epochs_infinite: bool = True,
        block_rows: int = 256,
        read_ahead: bool | None = None,
    ) -> None:
        if block_rows < 1:
            raise UnweaveError(f"RowStream: expected block_rows of at least 1, found {block_rows}")
        self.data, self.seed, self.epochs_infinite, self.block_rows = data, seed, epochs_infinite, block_rows
        self.d_in, self.d_out = data.d_in, data.d_out
        self.d_side: int | None = getattr(data, "d_side", None)
        self.n_rows: int | None = None  # rows in an epoch; None for a source, which does not say
        if isinstance(data, ActivationStore):
            self.n_rows = data.n_rows
            self._sizes = data.shard_sizes  # a store may grow meanwhile; the stream keeps to the rows it began with
            self._blocks = _Blocks(data)
            if not self.n_rows:
                raise UnweaveError(f"{data!r} holds no rows to read: harvest some first")
        self._read_ahead = cores() > 1 if read_ahead is None else read_ahead
        self._permuted_rate: float | None = None
        self._ahead: ReadAhead[_Group] | None = None
        self._goto(epoch=0, piece=0, offset=0)

    def _goto(self, epoch: int, piece: int, offset: int) -> None:
        """Stand at row ``offset`` of piece (block or batch) number ``piece`` of an epoch."""
        self.close()
        self._epoch, self._piece, self._offset = epoch, piece, offset
        self._groups: Iterator[_Group] | None = None
        self._group: _Group | None = None  # what is being handed out
        self._within = 0  # how many of its pieces have been

    def close(self) -> None:
        """End the thread that reads ahead, if there is one. Reading again goes on where it was left."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()
            self._groups = self._group = None

    @property
    def epoch(self) -> int:
        """Finished passes over the data."""
        return self._epoch

    @property
    def at_epoch_start(self) -> bool:
        return self._piece == 0 and self._offset == 0

    @property
    def ended(self) -> bool:
        return not self.epochs_infinite and self._epoch > 0

    def __repr__(self) -> str:
        size = f"{self.n_rows:,} rows an epoch" if self.n_rows else "live source"
        unit = "block" if self.n_rows else "batch"
        return f"RowStream({size}, seed {self.seed}, at epoch {self._epoch}, {unit} {self._piece}, row {self._offset})"

    def read(self, n: int, *, cross_epochs: bool = True) -> Chunk:
        """The next ``n`` rows, copied, with the document of each; across blocks and epochs.

        Fewer rows come back only at the end of a stream of one epoch, or, with ``cross_epochs=False``, where an epoch
        ends before ``n`` rows are found.
        """
        parts = self.read_parts(n, cross_epochs=cross_epochs)
        return join(parts) if parts else self._no_rows()

    def read_parts(self, n: int, *, cross_epochs: bool = True) -> list[Chunk]:
        """The same rows as ``read`` gives, as pieces that were not copied: look at them, or copy them, at once."""
        place = self._epoch, self._piece, self._offset
        try:
            return self._read_parts(n, cross_epochs)
        except BaseException:  # nothing was handed out; and a broken iterator would pass for the end of an epoch
            self._goto(*place)
            raise

    def _read_parts(self, n: int, cross_epochs: bool) -> list[Chunk]:
        parts: list[Chunk] = []
        missing, missing_before_epoch = n, -1
        while missing and not self.ended:
            group = self._next_group()
            if group is None:
                if not cross_epochs and missing < n:
                    break
                if missing == missing_before_epoch:
                    raise UnweaveError("the source gave no rows: is its data empty, or was every row filtered out?")
                missing_before_epoch = missing
                self._goto(self._epoch + 1, 0, 0)
                continue
            rows, ends = group
            start = (ends[self._within - 1] if self._within else 0) + self._offset
            stop = min(start + missing, ends[-1])
            parts.append(_cut(rows, slice(start, stop)))
            missing -= stop - start
            within = bisect_right(ends, stop)
            self._piece += within - self._within
            self._offset = stop - (ends[within - 1] if within else 0)
            self._within = within
            if within == len(ends):
                self._group = None
        return parts

    def _next_group(self) -> _Group | None:
        if self._ahead is not None and self._ahead.lost:
            self.close()
        if self._group is None:
            if self._groups is None:
                self._groups = self._groups_from(self._epoch, self._piece)
            self._group, self._within = next(self._groups, None), 0
        return self._group

    def _groups_from(self, epoch: int, skip: int) -> Iterator[_Group]:
        if not isinstance(self.data, ActivationStore):
            batches = self.data.batches(skip=skip)
            return map(_alone, (Chunk(b.input, b.target, b.meta.document.cpu(), b.side) for b in batches))
        order = self._block_order(epoch)[skip:]
        if not self._read_ahead or not len(order):
            return map(_alone, self._blocks.pieces(order))
        self._ahead = ReadAhead(self._blocks.groups(order, self.block_rows))
        return self._ahead

    def _block_order(self, epoch: int) -> Tensor:
        """``(n_blocks, 3)`` int64: shard, first row and stop row of each block, in the order of an epoch."""
        blocks = []
        for shard, size in enumerate(self._sizes):
            first = torch.arange(0, size, self.block_rows)
            stop = (first + self.block_rows).clamp(max=size)
            blocks.append(torch.stack([torch.full_like(first, shard), first, stop], dim=1))
        table = torch.cat(blocks)
        # Hashed, so that epoch 1 of seed 0 and epoch 0 of seed 1 have nothing in common.
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return table[torch.randperm(len(table), generator=generator)]

    def _no_rows(self) -> Chunk:
        dtype, side_dtype = None, None
        if isinstance(self.data, ActivationStore):
            dtype, side_dtype = self.data.dtype, self.data.side_dtype
        inputs, target = torch.empty(0, self.d_in, dtype=dtype), torch.empty(0, self.d_out, dtype=dtype)
        side = None if self.d_side is None else torch.empty(0, self.d_side, dtype=side_dtype)
        return Chunk(inputs, target, torch.empty(0, dtype=torch.long), side)

    def permuted_same_document_rate(self) -> float | None:
        """The same-document rate of a full permutation of the data; None for a source, which cannot tell."""
        if self._permuted_rate is None and isinstance(self.data, ActivationStore):
            self._permuted_rate = self.data.same_document_rate()
        return self._permuted_rate

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: plain integers."""
        return {
            "epoch": self._epoch,
            "piece": self._piece,
            "offset": self._offset,
            "seed": self.seed,
            "block_rows": self.block_rows,
            "n_rows": self.n_rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken.

        Raises:
            UnweaveError: when seed, block size or number of rows differ: the order would be another one.
        """
        for key in ("seed", "block_rows", "n_rows"):
            if state[key] != getattr(self, key):
                raise UnweaveError(
                    f"RowStream: the saved state has {key} {state[key]}, this stream has {getattr(self, key)}. Rows "
                    "would come in another order: open the same data with the same settings"
                )
        self._goto(state["epoch"], state["piece"], state["offset"])


class _Blocks:
    """Reads blocks of a store. It has shard readers of its own, since those of the store belong to another thread."""

    def __init__(self, store: ActivationStore) -> None:
        self._manifest, self._pool = store.manifest, ShardPool(store.folder)

    def pieces(self, order: Tensor) -> Iterator[Chunk]:
        """Each ``(shard, first row, stop row)`` of ``order``, as views of the file's pages."""
        tied = self._manifest.d_out is None
        for some in order.split(4096):
            for shard, first, stop in some.tolist():
                reader, rows = self._pool.get(self._manifest.shards[shard], self._manifest), slice(first, stop)
                inputs = reader.input(rows)
                target = inputs if tied else reader.target(rows)
                yield Chunk(inputs, target, reader.document(rows), reader.side(rows))

    def groups(self, order: Tensor, block_rows: int) -> Iterator[_Group]:
        """The same blocks copied into memory, some at a time: to hand over each by itself would cost more than it."""
        manifest = self._manifest
        row_bytes = (manifest.d_in + (manifest.d_out or 0)) * manifest.read_dtype.itemsize + manifest.side_bytes
        n_blocks = max(1, min(_GROUP_ROWS, _GROUP_BYTES // row_bytes) // block_rows)
        pieces = self.pieces(order)
        while some := list(islice(pieces, n_blocks)):
            inputs = _joined([piece.input for piece in some])
            tied = some[0].target is some[0].input
            target = inputs if tied else _joined([piece.target for piece in some])
            document = _joined([piece.document for piece in some])
            sides = [piece.side for piece in some if piece.side is not None]
            chunk = Chunk(inputs, target, document, _joined(sides) if sides else None)
            yield _Group(chunk, list(accumulate(len(piece.document) for piece in some)))


def _joined(parts: list[Tensor]) -> Tensor:
    # NumPy copies in the calling thread; torch would call up a second team of threads to compete with the first.
    return torch.from_numpy(np.concatenate([part.view(torch.uint8).numpy() for part in parts])).view(parts[0].dtype)


def _alone(piece: Chunk) -> _Group:
    return _Group(piece, [len(piece.document)])


def _cut(rows: Chunk, at: slice) -> Chunk:
    """Some of the rows, as views."""
    inputs = rows.input[at]
    target = inputs if rows.target is rows.input else rows.target[at]
    return Chunk(inputs, target, rows.document[at], None if rows.side is None else rows.side[at])


def join(parts: list[Chunk]) -> Chunk:
    """Chunks as one, copied (also a single one); tied targets stay tied."""
    inputs = torch.cat([p.input for p in parts])
    tied = all(p.target is p.input for p in parts)
    target = inputs if tied else torch.cat([p.target for p in parts])
    sides = [p.side for p in parts if p.side is not None]
    return Chunk(inputs, target, torch.cat([p.document for p in parts]), torch.cat(sides) if sides else None)
