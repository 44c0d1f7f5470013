"""What one dictionary needs while it trains or encodes: a plan, buffers used again, bfloat16 shadows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.kernels import backend as backends
from unweave.kernels import int8, multiply
from unweave.kernels.backend import Backend, BackendName, backend
from unweave.kernels.int8 import Int8Product
from unweave.kernels.multiply import LIBRARIES, Library
from unweave.kernels.pattern import Pattern, concatenate
from unweave.kernels.select import AboveRule, BatchTopKRule, Exact, Rule, select
from unweave.kernels.select.screen import CertifiedScreen, Screen, largest_errors

Scores = Literal["float32", "certified", "screen", "int8_screen", "bfloat16"]
_IN_WORDS: dict[str, str] = {
    "float32": "exact float32",
    "certified": "certified bfloat16 screen",
    "screen": "bfloat16 screen",
    "int8_screen": "int8 screen",
    "bfloat16": "bfloat16",
}
# Errors of scores in 8 bits stay below five of their lengths: a wide margin to begin with, which is then learned.
_SCREENS: dict[str, Callable[[], Screen]] = {"certified": CertifiedScreen, "int8_screen": lambda: Screen(6.0)}
_CHUNK = 2048  # rows; a training batch of the usual size is one chunk


@dataclass(frozen=True)
class Plan:
    """How to compute: which kernels, and how scores, the product of rows and encoder, are made.

    ``scores`` is "float32"; "screen" for a product in bfloat16 that finds candidates, among which float32 decides;
    "certified" for the same with margins that are proven, not learned; "int8_screen" for candidates by a product in 8
    bits; or "bfloat16" for a product that is taken as it is (but under a rule that is fine), and where a training step
    gathers rows and atoms it reads copies in bfloat16 too. ``library`` makes the product in float32 on a processor.
    """

    backend: BackendName = "reference"
    scores: Scores = "float32"
    library: Library = "torch"

    @property
    def low(self) -> bool:
        """Whether the product is made in bfloat16, of copies that are kept up to date."""
        return self.scores in ("certified", "screen", "bfloat16")

    @property
    def name(self) -> str:
        if self.scores != "float32":
            return f"{self.backend}+{self.scores}"
        return f"cpu+{self.library}" if self.backend == "cpu" else self.backend

    def why_not(self, d: int = 0) -> str | None:
        """Why this machine, or rows of ``d`` numbers, cannot be served by this plan; None when they can."""
        if self.scores == "int8_screen":
            if d > int8.LONGEST:
                return f"products of more than {int8.LONGEST:,} numbers ({d:,}) do not add up in int8's 32 bits"
            if reason := int8.why_not():
                return reason
        return backends.why_not(self.backend) or multiply.why_not(self.library)

    def __str__(self) -> str:
        by = f" by {self.library}" if self.backend == "cpu" and self.scores == "float32" else ""
        return f"{self.backend}, {_IN_WORDS[self.scores]}{by}"


def plan_of(name: str) -> Plan:
    """The plan of that name: a backend, or one with how or by what scores are made behind a "+".

    "cpu" is by torch: old checkpoints and timings say so. As a pin it is by whatever is fastest.
    """
    base: Any
    how: Any
    base, _, how = name.partition("+")
    return Plan(base, library=how) if how in LIBRARIES else Plan(base, how or "float32")


class Shadow:
    """A bfloat16 copy of a weight matrix, kept up to date by the update kernel.

    Attributes:
        copy: ``(n_features, d)``; None before it was first asked for, and after :meth:`forget`.
    """

    def __init__(self) -> None:
        self.copy: Tensor | None = None
        self._version: int | None = None  # of the weights, as torch counts changes made through torch

    def follow(self, W: Tensor) -> Tensor:
        """The copy; made anew where there is none, or where somebody but the update kernel has changed the weights."""
        version = -1 if W.is_inference() else W._version
        if version != self._version:
            self.forget()
        if self.copy is None:
            self.copy = W.bfloat16()
        self._version = version
        return self.copy

    def forget(self) -> None:
        """The weights have changed: the next step copies them again."""
        self.copy = None


class Buffers:
    """Memory for scores, one matrix of each type, used again and again.

    Fresh memory costs a page fault for every 4 kB of scores: as much as the product itself.
    """

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def take(self, n: int, n_features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``(n, n_features)``, contiguous; what the last one of this type held is gone."""
        held = self._held.get(dtype)
        if held is None or len(held) < n or held.shape[1] != n_features:
            held = self._held[dtype] = torch.empty(n, n_features, dtype=dtype, device=device)
        return held[:n]


class Workspace:
    """Scores and shadows of one dictionary. Results depend on the plan alone, not on what is kept here.

    Attributes:
        plan: how to compute.
        screen: what is known about the error of rough scores.
        encoder, decoder: shadows of the weights, of which a plan uses both, the first or none.
    """

    _multiplies_centred = True  # and has a use for a bfloat16 copy of them

    def __init__(self, plan: Plan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.ops: Backend = backend(plan.backend)
        self.screen: Any = _SCREENS.get(plan.scores, Screen)()
        if plan.backend == "gpu":
            from unweave.kernels._triton import DeviceScreen

            self.screen = DeviceScreen(device)
        self.encoder, self.decoder = Shadow(), Shadow()
        self._buffers = Buffers()
        self._last: tuple[Any, Any] = (None, None)  # the rows that were centred last, and their bfloat16 copy

    def forget(self) -> None:
        """The weights have changed: the next step copies them again."""
        self.encoder.forget()
        self.decoder.forget()

    def centred(self, rows: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
        """``rows - centre (n, d)`` and its norms ``(n,)``; what :meth:`select` needs beside is kept for it."""
        rows = rows.detach()
        if centre is None:
            return rows, rows.norm(dim=1)
        x, norms, low = self.ops.rows.centred(rows, centre, self._multiplies_centred and self.plan.low)
        self._last = (x, low)
        return x, norms

    def weights(self, W_enc: Tensor) -> Tensor:
        """The encoder as scores were made with it, where nothing but these scores counts."""
        return self.encoder.follow(W_enc) if self.plan.scores == "bfloat16" else W_enc

    def atoms(self, W_dec: Tensor) -> Tensor:
        """The decoder as kernels that gather its rows read it."""
        return self.decoder.follow(W_dec) if self.plan.scores == "bfloat16" else W_dec

    def rows(self, A: Tensor) -> Tensor:
        """Rows as kernels that gather them read them."""
        if self.plan.scores != "bfloat16":
            return A
        return self._bfloat16(A)

    def shadow_of(self, name: str) -> Tensor | None:
        """What the update kernel has to keep up to date beside the parameter of that name, if anything."""
        shadow = {"W_enc": self.encoder, "W_dec": self.decoder}.get(name)
        return None if shadow is None else shadow.copy

    def select(
        self,
        rule: Rule,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        norms: Tensor | None = None,
        raw: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Pattern, Tensor]:
        """The entries of ``x W_enc^T + b_enc`` that a rule takes, with their float32 values.

        Args:
            x: ``(n, d)``. W_enc: ``(n_features, d)``. b_enc: ``(n_features,)``.
            norms: ``(n,)`` of the rows of x, where somebody knows them already.
            raw: rows and the centre that was taken from them to get x (None for none); see
                :mod:`unweave.kernels.joint`.
        """
        x, W_enc, b_enc = x.detach() if x.requires_grad else x, W_enc.detach(), b_enc.detach()
        made = Int8Product(self.ops.rows, x, W_enc) if self.plan.scores == "int8_screen" else None
        if isinstance(rule, BatchTopKRule) or len(x) <= _CHUNK:
            return self._select(rule, x, W_enc, b_enc, norms, made)
        # Rows that do not depend on each other go chunk by chunk: the scores stay in a buffer that is warm.
        parts = [
            self._select(rule, x[i : i + _CHUNK], W_enc, b_enc, None if norms is None else norms[i : i + _CHUNK], made)
            for i in range(0, len(x), _CHUNK)
        ]
        return concatenate([pattern for pattern, _ in parts]), torch.cat([values for _, values in parts])

    def _select(
        self, rule: Rule, x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None, made: Int8Product | None
    ) -> tuple[Pattern, Tensor]:
        def place(dtype: torch.dtype) -> Tensor:
            return self._buffers.take(len(x), len(W_enc), dtype, x.device)

        exact = None
        if made is not None:
            rough = made.scores(x, place)
            scores, exact = rough.scores, Exact(x, W_enc, rough.lengths(), self.screen)
        elif self.plan.low:
            low, shadow = self._bfloat16(x), self.encoder.follow(W_enc)
            scores = multiply.multiply(low, shadow, lambda: place(low.dtype))
            exact = self._exact(rule, x, low, W_enc, norms)
        else:
            scores = multiply.multiply(x, W_enc, lambda: place(x.dtype), self.plan.library)
        return select(self.ops.select, rule, scores, b_enc, exact)

    def _bfloat16(self, x: Tensor) -> Tensor:
        rows, low = self._last
        return low if x is rows and low is not None else x.bfloat16()

    def _exact(self, rule: Rule, x: Tensor, low: Tensor, W_enc: Tensor, norms: Tensor | None) -> Exact | None:
        """What bfloat16 scores are checked with; None where they are taken as they are."""
        if self.plan.scores == "bfloat16" and not (isinstance(rule, AboveRule) and rule.fine):
            return None
        if self.plan.scores == "certified":
            lengths = largest_errors(self.ops.select, x, low, W_enc, self.encoder.follow(W_enc))
        else:
            lengths = x.norm(dim=1) if norms is None else norms
        return Exact(x, W_enc, lengths, self.screen)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` for terms that only nudge (AuxK): in bfloat16 where the plan does not promise float32.

        An int8 screen serves processors that are slow at bfloat16 too; there float32 it is.
        """
        low = self.plan.scores in ("screen", "bfloat16")
        low = low or (self.plan.scores == "int8_screen" and backends.has_fast_bfloat16())
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype) if low else a @ b

    def state_dict(self) -> dict[str, Any]:
        return self.screen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.screen.load_state_dict(state)
        self.forget()
