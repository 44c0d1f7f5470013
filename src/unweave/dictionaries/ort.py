"""OrtSAE: BatchTopK whose atoms keep out of each other's way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Step
from unweave.dictionaries.batch_topk import BatchTopK, BatchTopKConfig
from unweave.dictionaries.registry import register
from unweave.kernels.gradients.reference import Extra


class OrtConfig(BatchTopKConfig):
    """
    Attributes:
        ort_coefficient: gamma.
        chunk_size: features, at least, among which a feature looks for its nearest. They are dealt out anew every
            time, so that the cost is linear in n_features.
        every: steps from one penalty to the next.
    """

    ort_coefficient: float = Field(0.25, ge=0)
    chunk_size: int = Field(8192, ge=2)
    every: PositiveInt = 5


@register("ort")
class Ort(BatchTopK):
    """BatchTopK with the penalty ``gamma mean_i (max_{j != i} cos(d_i, d_j))^2``, j from a random chunk with i.

    Atoms that share a direction hide one feature in another (absorption) or name two at once (composition). The
    penalty is on the decoder alone and has no unit, so gamma needs no translation; the penalty is not raised for the
    steps that go without it. Gamma, chunk and interval were reported at second hand.
    """

    Config = OrtConfig
    citation = "Korznikov et al. 2025, OrtSAE: orthogonal sparse autoencoders uncover atomic features, arXiv:2509.22033"
    good_for = "features that overlap less: less absorption and composition than batch_topk"

    def loss(self, batch: TrainingBatch) -> Loss:
        loss, penalty = super().loss(batch), self._penalty(self.W_dec)
        terms = {**loss.terms, "ort": penalty.detach()}
        return Loss(loss.total + self.config.ort_coefficient * penalty, terms, loss.code, loss.reconstruction)

    def backward(self, step: Step) -> Backward:
        back = super().backward(step)
        atoms = self.W_dec.detach().requires_grad_()
        with torch.enable_grad():
            penalty = self._penalty(atoms)
        back.terms["ort"] = penalty.detach()
        if penalty.requires_grad:
            rows = self.config.ort_coefficient * torch.autograd.grad(penalty, atoms)[0]
            at, dead = back.decoder.at, back.decoder.rows
            if at is not None and dead is not None:
                here = (at >= 0).nonzero().squeeze(1)
                rows = rows.index_add(0, here, dead[at[here]])
            back.decoder = Extra(torch.arange(len(rows), device=rows.device), rows)
            back.total = back.total + self.config.ort_coefficient * penalty.detach()
        return back

    def _penalty(self, atoms: Tensor) -> Tensor:
        """The mean squared cosine of each atom with the nearest in its chunk; zero where this step goes without."""
        if self.config.ort_coefficient == 0 or int(self.n_updates) % self.config.every:
            return atoms.new_zeros(())
        return nearness(atoms, self.config.chunk_size)


def nearness(atoms: Tensor, chunk_size: int) -> Tensor:
    """``mean_i (max_{j != i} cos(d_i, d_j))^2`` over ``(m, d)`` atoms, j from the chunk that i was dealt into."""
    unit, m = F.normalize(atoms, dim=1), len(atoms)
    if m < 2:
        return atoms.new_zeros(())
    n_chunks = max(1, m // chunk_size)
    order = torch.randperm(m, device=atoms.device) if n_chunks > 1 else torch.arange(m, device=atoms.device)
    nearest = torch.empty_like(order)
    with torch.no_grad():
        for chunk in order.tensor_split(n_chunks):
            cosines = (unit[chunk] @ unit[chunk].T).fill_diagonal_(-2.0)
            nearest[chunk] = chunk[cosines.argmax(1)]
    return (unit * unit[nearest]).sum(1).square().mean()
