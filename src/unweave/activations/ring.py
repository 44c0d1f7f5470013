"""ShuffleRing: batches of well mixed rows from a stream whose neighbours belong together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unweave.activations.stream import Chunk, RowStream, join
from unweave.errors import UnweaveError

_RECENT = 32  # batches over which the age of drawn rows is averaged


class ShuffleRing:
    """Holds ``capacity`` rows; each :meth:`next` draws a random batch and puts new rows in the places drawn.

    Nothing is ever moved or rebuilt: rows are copied out (``index_select``) and overwritten in place, so the
    cost of a batch does not depend on the capacity. How long a row stays is geometric with mean ``capacity /
    batch_size`` batches.

    Args:
        stream: where rows come from. batch_size: rows in a batch.
        capacity: rows held; fewer when the data has fewer (never more than one epoch, so no row is held twice at the
            start). seed: of the draws. device: where the rows are held and handed out.

    Raises:
        UnweaveError: when batch_size is larger than the capacity or than the rows there are.
    """

    def __init__(
        self,
        stream: RowStream,
        batch_size: int = 2048,
        capacity: int = 65_536,
        seed: int = 0,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        if not 1 <= batch_size <= capacity:
            raise UnweaveError(
                f"ShuffleRing: expected 1 <= batch_size <= capacity, found batch_size {batch_size} and capacity "
                f"{capacity}"
            )
        self.stream, self.batch_size, self.capacity = stream, batch_size, capacity
        self.device = torch.device(device)
        self._generator = torch.Generator().manual_seed(seed)
        self._ring: Chunk | None = None  # filled at the first draw, so that a resumed run need not fill it in vain
        self._entered = torch.empty(0, dtype=torch.long)  # per slot, the batch after which its row came in
        self._n_drawn = 0
        self._drawn_documents = torch.empty(0, dtype=torch.long)
        self._ages: deque[float] = deque(maxlen=_RECENT)

    def __len__(self) -> int:
        """Rows held now."""
        return 0 if self._ring is None else len(self._ring.document)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self):,} of {self.capacity:,} rows, batches of {self.batch_size:,}, "
            f"{self._n_drawn:,} drawn)"
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches, without end unless the stream has one: then every row is given once and the last may be short."""
        while not (self.stream.ended and self._ring is not None and len(self) == 0):
            yield self.next()

    def next(self) -> tuple[Tensor, Tensor]:
        """A batch: ``input (b, d_in)`` and ``target (b, d_out)`` in the stored dtype, the same tensor when tied."""
        return self.draw()[:2]

    def draw(self) -> Chunk:
        """A batch with all that belongs to its rows: their documents, and their side inputs where there are any."""
        ring = self._ring or self._fill()
        if len(self) == 0:
            raise UnweaveError("the stream has ended and every row of the ring was given")
        self._n_drawn += 1
        slots = self._draw()
        self._drawn_documents = ring.document[slots]
        self._ages.append(float((self._n_drawn - self._entered[slots]).double().mean()))
        places = slots.to(self.device)
        drawn = _taken(ring, places, self._drawn_documents)
        self._refill(ring, slots, places)
        return drawn

    def sample(self, n: int) -> Chunk:
        """Up to ``n`` rows spread evenly over those held, without drawing them: the next batches stay the same."""
        ring = self._ring or self._fill()
        slots = torch.linspace(0, len(self) - 1, min(n, len(self))).round().long()
        return _taken(ring, slots.to(self.device), ring.document[slots])

    def _fill(self) -> Chunk:
        stream = self.stream
        if stream.n_rows is not None:
            first = stream.read(min(self.capacity, stream.n_rows))
        else:  # a source tells its size only by ending
            mid_epoch = not stream.at_epoch_start
            first = stream.read(self.capacity, cross_epochs=False)
            if mid_epoch and len(first.document) < self.capacity:  # what was left of this epoch, then a whole one
                more = stream.read(self.capacity - len(first.document), cross_epochs=False)
                first = join([first, more])
        n = len(first.document)
        if n < self.batch_size:
            raise UnweaveError(
                f"ShuffleRing: expected at least batch_size = {self.batch_size} rows, found {n} in all. Choose "
                f"batch_size <= {n} or get more rows"
            )
        self._ring = self._held(first)
        # As if they had come in batch by batch before the first draw, so ages mean the same from the start.
        self._entered = -torch.div(torch.arange(n - 1, -1, -1), self.batch_size, rounding_mode="floor")
        return self._ring

    def _held(self, rows: Chunk) -> Chunk:
        inputs = rows.input.to(self.device)
        target = inputs if rows.target is rows.input else rows.target.to(self.device)
        return Chunk(inputs, target, rows.document, None if rows.side is None else rows.side.to(self.device))

    def _draw(self) -> Tensor:
        """``(b,)`` distinct slots, every set equally likely, in random order."""
        held = len(self)
        n = min(self.batch_size, held)
        if 4 * n >= held:
            return torch.randperm(held, generator=self._generator)[:n]
        # A permutation of the whole ring would cost more than the batch: draw some more than needed (twice as many as
        # are expected to come twice) and keep a random part of the distinct ones. No slot is favoured in any step.
        slots = torch.empty(0, dtype=torch.long)
        while len(slots) < n:
            slots = torch.randint(held, (n + n * n // held + 16,), generator=self._generator).unique()
        return slots[torch.randperm(len(slots), generator=self._generator)[:n]]

    def _refill(self, ring: Chunk, slots: Tensor, places: Tensor) -> None:
        n = 0
        for part in self.stream.read_parts(len(slots)):  # straight from the file's pages into the ring
            m = n + len(part.document)
            _overwrite(ring.input, places[n:m], part.input)
            if ring.target is not ring.input:
                _overwrite(ring.target, places[n:m], part.target)
            if ring.side is not None:
                _overwrite(ring.side, places[n:m], part.side)
            ring.document[slots[n:m]] = part.document
            n = m
        self._entered[slots[:n]] = self._n_drawn
        if n < len(slots):  # the stream has ended: the ring shrinks
            keep = torch.ones(len(self), dtype=torch.bool)
            keep[slots[n:]] = False
            kept = keep.nonzero().flatten().to(self.device)
            self._ring = _taken(ring, kept, ring.document[keep])
            self._entered = self._entered[keep]

    def stats(self) -> dict[str, float | int | None]:
        """What the ring really does, measured on the rows drawn, not computed from the settings.

        - ``ring_rows``: rows held now.
        - ``mean_age``: how many batches the rows of the last 32 batches had been in the ring, on average.
        - ``effective_rows``: ``mean_age * batch_size``. By Little's law (rows in a system = arrival rate x mean stay)
          that is how many rows truly take part in the mixing. It equals ``ring_rows`` when every row held is equally
          likely to be drawn, and falls below it when some are never drawn. It starts at half (the first fill is as
          old as if it had streamed in) and settles after a few ``capacity / batch_size`` batches.
        - ``same_document_rate``: share of the pairs of distinct rows in the last batch that come from one document.
        - ``expected_same_document_rate``: the same for a full permutation of the store; None over a live source.
        """
        n = len(self._drawn_documents)
        counts = self._drawn_documents.unique(return_counts=True)[1].double()
        mean_age = sum(self._ages) / len(self._ages) if self._ages else None
        return {
            "ring_rows": len(self),
            "mean_age": mean_age,
            "effective_rows": None if mean_age is None else mean_age * self.batch_size,
            "same_document_rate": float((counts * (counts - 1)).sum()) / (n * (n - 1)) if n > 1 else None,
            "expected_same_document_rate": self.stream.permuted_same_document_rate(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything the next batches depend on: tensors (copies of the rows held), and plain values.

        ``target`` is absent when the target is the input, ``side`` without side inputs. Before the first draw there
        are no rows yet.
        """
        state: dict[str, Any] = {
            "batch_size": self.batch_size,
            "capacity": self.capacity,
            "n_drawn": self._n_drawn,
            "ages": list(self._ages),
            "stream": self.stream.state_dict(),
            "generator": self._generator.get_state(),
            "drawn_documents": self._drawn_documents.clone(),
        }
        if self._ring is not None:
            state |= {"input": self._ring.input.cpu().clone(), "document": self._ring.document.clone()}
            state["entered"] = self._entered.clone()
            if self._ring.target is not self._ring.input:
                state["target"] = self._ring.target.cpu().clone()
            if self._ring.side is not None:
                state["side"] = self._ring.side.cpu().clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken; the stream is set back too.

        Raises:
            UnweaveError: when batch size, capacity or the widths of the rows differ.
        """
        for key in ("batch_size", "capacity"):
            if state[key] != getattr(self, key):
                raise UnweaveError(f"ShuffleRing: the saved state has {key} {state[key]}, not {getattr(self, key)}")
        self.stream.load_state_dict(state["stream"])
        self._n_drawn = state["n_drawn"]
        self._ages = deque(state["ages"], maxlen=_RECENT)
        self._generator.set_state(state["generator"].cpu())
        self._drawn_documents = state["drawn_documents"].cpu().clone()
        self._ring = None
        if "input" in state:
            inputs = state["input"].to(self.device, copy=True)
            target = state["target"].to(self.device, copy=True) if "target" in state else inputs
            if inputs.shape[1] != self.stream.d_in or target.shape[1] != self.stream.d_out:
                raise UnweaveError(
                    f"ShuffleRing: the saved rows are {inputs.shape[1]} -> {target.shape[1]} wide, the stream's are "
                    f"{self.stream.d_in} -> {self.stream.d_out}"
                )
            side = state["side"].to(self.device, copy=True) if "side" in state else None
            d_side = None if side is None else side.shape[1]
            if d_side != self.stream.d_side:
                raise UnweaveError(
                    f"ShuffleRing: the saved side inputs are {d_side or 0} wide, the stream's {self.stream.d_side or 0}"
                )
            self._ring = Chunk(inputs, target, state["document"].cpu().clone(), side)
            self._entered = state["entered"].cpu().clone()


def _taken(rows: Chunk, places: Tensor, document: Tensor) -> Chunk:
    """The rows at some places, copied; a tied target stays tied."""
    inputs = rows.input.index_select(0, places)
    target = inputs if rows.target is rows.input else rows.target.index_select(0, places)
    return Chunk(inputs, target, document, None if rows.side is None else rows.side.index_select(0, places))


def _overwrite(held: Tensor, places: Tensor, new: Tensor | None) -> None:
    """``held[places] = new``, in place."""
    if new is None:
        raise UnweaveError("ShuffleRing: the stream gave side inputs first and none now")
    if new.dtype != held.dtype:
        raise UnweaveError(f"ShuffleRing: the stream gave {held.dtype} rows first and {new.dtype} rows now")
    if held.device.type == "cpu":
        # NumPy copies whole rows of bytes where index_copy_ goes by elements: half the time for 2,048 bf16 rows.
        rows = new.detach().cpu().contiguous().view(torch.uint8)
        held.view(torch.uint8).numpy()[places.numpy()] = rows.numpy()
    else:
        held.index_copy_(0, places, new.to(held.device))
