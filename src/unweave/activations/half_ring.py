"""HalfRing: the mixing buffer of SAELens and FAST, with the ring's interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unweave.activations.ring import ShuffleRing
from unweave.activations.stream import Chunk, RowStream


class HalfRing(ShuffleRing):
    """Fill, shuffle, hand out half, fill that half again, shuffle, ...: cycles in place of a row for a row.

    (FAST, Li et al. 2025; SAELens.) Within a cycle no row is given twice. A row is given in a cycle with probability
    1/2, so it stays 2 cycles on average. Since the places of the rows given stand idle until the cycle ends, three
    quarters of the capacity take part in the mixing on average (in a :class:`ShuffleRing` all of it does), and the data
    is read in bursts of half a ring: this is here to do as the paper did.

    Half is a whole number of batches, and so is twice it, the capacity: it is rounded down to that (data with fewer
    rows than the capacity is held as it is). Arguments are those of :class:`ShuffleRing`; a capacity below two batches
    is raised to two.
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
        if 1 <= batch_size <= capacity:
            capacity = 2 * batch_size * max(1, capacity // (2 * batch_size))
        super().__init__(stream, batch_size, capacity, seed, device=device)
        self._order = torch.empty(0, dtype=torch.long)  # the slots still to be given in this cycle
        self._given = torch.empty(0, dtype=torch.long)  # those given, whose rows wait to be replaced

    def _draw(self) -> Tensor:
        if len(self._order) == 0:
            self._begin_cycle()
        return self._order[: self.batch_size]

    def _begin_cycle(self) -> None:
        held = len(self)
        half = held // 2 // self.batch_size * self.batch_size
        if self.stream.ended:  # nothing will come in for what goes out
            half = held
        order = torch.randperm(held, generator=self._generator)
        self._order, self._given = order[: max(half, min(self.batch_size, held))], order[:0]

    def _refill(self, ring: Chunk, slots: Tensor, places: Tensor) -> None:
        self._order, self._given = self._order[len(slots) :], torch.cat([self._given, slots])
        if len(self._order) == 0:
            super()._refill(ring, self._given, self._given.to(self.device))
            self._given = self._given[:0]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "order": self._order.clone(), "given": self._given.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._order, self._given = state["order"].cpu().clone(), state["given"].cpu().clone()
