"""What one dictionary needs while it trains or encodes: a plan, buffers used again, the bfloat16 shadow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unweave.kernels.backend import Backend, BackendName, backend
from unweave.kernels.pattern import Pattern, concatenate
from unweave.kernels.select import BatchTopKRule, Exact, Rule, select
from unweave.kernels.select.screen import Screen

_CHUNK = 2048  # rows; a training batch of the usual size is one chunk


@dataclass(frozen=True)
class Plan:
    """How to compute: which kernels, and whether a bfloat16 product screens the features before float32 decides."""

    backend: BackendName = "reference"
    screen: bool = False

    def __str__(self) -> str:
        return f"{self.backend}, {'bfloat16 screen' if self.screen else 'exact float32'}"


class Workspace:
    """Scores and shadow of one encoder. Results do not depend on it; only time and memory do.

    Attributes:
        plan: how to compute.
        screen: what is known about the error of bfloat16 scores.
        shadow: ``(n_features, d)`` bfloat16 copy of the encoder, kept up to date by the update kernel; None when the
            plan does not screen, or when the weights have changed behind its back (see :meth:`forget`).
    """

    def __init__(self, plan: Plan, device: torch.device | str = "cpu") -> None:
        self.plan = plan
        self.ops: Backend = backend(plan.backend)
        self.screen: Any = Screen()
        if plan.backend == "gpu":
            from unweave.kernels._triton import DeviceScreen

            self.screen = DeviceScreen(device)
        self.shadow: Tensor | None = None
        self._version: int | None = None  # of the weights, as torch counts changes made through torch
        self._scores: Tensor | None = None

    def forget(self) -> None:
        """The weights have changed: the next step copies them again."""
        self.shadow = None

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
        x, W_enc, b_enc = x.detach(), W_enc.detach(), b_enc.detach()
        if self.plan.screen:
            self._follow(W_enc)
        if isinstance(rule, BatchTopKRule) or len(x) <= _CHUNK:
            return self._select(rule, x, W_enc, b_enc, norms)
        # Rows that do not depend on each other go chunk by chunk: the scores stay in a buffer that is warm.
        norms = x.norm(dim=1) if norms is None and self.plan.screen else norms
        parts = [
            self._select(rule, x[i : i + _CHUNK], W_enc, b_enc, None if norms is None else norms[i : i + _CHUNK])
            for i in range(0, len(x), _CHUNK)
        ]
        return concatenate([pattern for pattern, _ in parts]), torch.cat([values for _, values in parts])

    def _follow(self, W_enc: Tensor) -> None:
        """Copy the weights where they were not copied yet, or where somebody but the update kernel has changed them."""
        version = -1 if W_enc.is_inference() else W_enc._version
        if version != self._version:
            self.forget()
        if self.shadow is None:
            self.shadow = W_enc.bfloat16()
        self._version = version

    def _select(
        self, rule: Rule, x: Tensor, W_enc: Tensor, b_enc: Tensor, norms: Tensor | None
    ) -> tuple[Pattern, Tensor]:
        if not self.plan.screen:
            scores = torch.mm(x, W_enc.T, out=self._buffer(len(x), len(W_enc), x))
            return select(self.ops.select, rule, scores, b_enc)
        assert self.shadow is not None
        low = x.bfloat16()
        scores = torch.mm(low, self.shadow.T, out=self._buffer(len(x), len(W_enc), low))
        norms = x.norm(dim=1) if norms is None else norms
        return select(self.ops.select, rule, scores, b_enc, Exact(x, W_enc, norms, self.screen))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` for terms that only nudge (AuxK): in bfloat16 where the plan screens."""
        return (a.bfloat16() @ b.bfloat16()).to(a.dtype) if self.plan.screen else a @ b

    def _buffer(self, n: int, n_features: int, like: Tensor) -> Tensor:
        """Fresh memory costs a page fault for every 4 kB of scores: as much as the product itself."""
        held = self._scores
        if held is None or len(held) < n or held.shape[1] != n_features or held.dtype != like.dtype:
            held = self._scores = like.new_empty(n, n_features)
        return held[:n]

    def state_dict(self) -> dict[str, Any]:
        return self.screen.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.screen.load_state_dict(state)
        self.forget()
