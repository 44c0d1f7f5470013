"""Several encoders of the same rows in one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unweave.kernels.backend import backend
from unweave.kernels.int8 import Int8Product, Rough
from unweave.kernels.multiply import multiply
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Exact, Rule, select
from unweave.kernels.workspace import Buffers, Plan, Shadow, Workspace


class JointProduct:
    """The scores of all encoders for a batch, computed when the first of them asks.

    The encoders' weights are moved into one matrix and stay views of it; :meth:`part` takes them apart again. Each
    dictionary may subtract a centre of its own: the product is of the rows as they are, and the difference,
    ``W centre``, is a bias.
    """

    def __init__(self, encoders: Sequence[nn.Parameter], plan: Plan) -> None:
        sizes = [len(W) for W in encoders]
        self.plan, self.encoders = plan, list(encoders)
        self.W = torch.cat([W.detach() for W in encoders])
        for encoder, rows in zip(encoders, self.W.split(sizes)):
            encoder.data = rows
        self.shadow = self.W.bfloat16() if plan.low else None
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = [slice(end - size, end) for end, size in zip(ends, sizes)]
        self._of: Tensor | None = None
        self._scores: Tensor | None = None
        self._buffers = Buffers()
        self._rows: Tensor | None = None
        self._norms: Tensor | None = None
        self._rough: Rough | None = None

    def lengths(self, number: int) -> Tensor:
        """``(n,)``: what the errors of an encoder's rough scores are in proportion to, in the last product."""
        assert self._rough is not None
        return self._rough.lengths(self.slices[number])

    def norms(self, x: Tensor) -> Tensor:
        """``(n,)`` of the rows whose scores were asked for last."""
        if self._norms is None:
            self._norms = x.norm(dim=1)
        return self._norms

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(n, sum of n_features)`` for the rows ``x (n, d)``, and the rows as they were multiplied.

        The same tensors again for the same rows.
        """
        if self._of is not x:
            # Dictionaries step one after the other. What the first one's step moves are its own rows of W, so the
            # scores of the others are still those of their present weights.
            W = self.W if self.shadow is None else self.shadow
            self._rows, self._scores = x.to(W.dtype), None
            if self.plan.scores == "int8_screen":
                product = Int8Product(backend(self.plan.backend).rows, self._rows, W)
                self._rough = product.scores(self._rows, self._place)
                self._scores = self._rough.scores
            else:
                self._scores = multiply(self._rows, W, lambda: self._place(W.dtype), self.plan.library)
            self._of, self._norms = x, None
        assert self._scores is not None
        assert self._rows is not None
        return self._scores, self._rows

    def _place(self, dtype: torch.dtype) -> Tensor:
        assert self._rows is not None
        return self._buffers.take(len(self._rows), len(self.W), dtype, self.W.device)

    def forget_scores(self) -> None:
        """The weights have changed: the same rows have other scores now."""
        self._of = None

    def part(self) -> None:
        """Give every encoder memory of its own again."""
        for encoder in self.encoders:
            encoder.data = encoder.data.clone()


class _Slice(Shadow):
    """The part of a joint product's shadow that belongs to one encoder."""

    def __init__(self, joint: JointProduct, number: int) -> None:
        super().__init__()
        self._joint, self._at = joint, joint.slices[number]
        self.copy = None if joint.shadow is None else joint.shadow[self._at]
        self._version = joint.encoders[number]._version  # the joint shadow was copied a moment ago

    def forget(self) -> None:
        """The weights have changed: copy them into the joint shadow now."""
        if self.copy is not None:
            self.copy.copy_(self._joint.W[self._at])
        self._joint.forget_scores()


class JointWorkspace(Workspace):
    """A workspace whose scores are columns of a joint product."""

    _multiplies_centred = False

    def __init__(self, joint: JointProduct, number: int) -> None:
        super().__init__(joint.plan, joint.W.device)
        self._joint, self._number, self._slice = joint, number, joint.slices[number]
        self.encoder = _Slice(joint, number)

    def select(
        self,
        rule: Rule,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        norms: Tensor | None = None,
        raw: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Pattern, Tensor]:
        assert raw is not None
        rows, centre = raw
        W_enc, shift = W_enc.detach(), b_enc.detach()
        if self.plan.low:
            self.encoder.follow(W_enc)
        if centre is not None:
            shift = shift - W_enc @ centre
        scores, multiplied = self._joint.scores(rows)
        exact = None
        if self.plan.low:
            exact = self._exact(rule, rows, multiplied, W_enc, self._joint.norms(rows))
        elif self.plan.scores == "int8_screen":
            exact = Exact(rows, W_enc, self._joint.lengths(self._number), self.screen)
        return select(self.ops.select, rule, scores[:, self._slice], shift, exact)
