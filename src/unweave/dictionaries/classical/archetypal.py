"""Archetypal analysis: atoms are mixtures of data rows, and rows are mixtures of atoms."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries.classical._base import LESS, AtomDictionary, Classical, ClassicalConfig
from unweave.dictionaries.classical._solvers import simplex_codes
from unweave.dictionaries.registry import register


class ArchetypalConfig(ClassicalConfig):
    """
    Attributes:
        n_candidates: rows that archetypes are mixtures of, the extreme ones of the sample along random directions.
        max_iter: rounds of codes and archetypes.
        encode_steps: of the projected gradient that finds a row's code.
    """

    reservoir: PositiveInt = 4096
    n_candidates: PositiveInt = 512
    max_iter: PositiveInt = 50
    encode_steps: PositiveInt = 200


@register("archetypal")
class Archetypal(Classical, AtomDictionary):
    """``x ~ a Z`` and ``Z = B C`` with C rows of the data, all entries of a and B 0 or more and every row's sum 1.

    So each archetype Z_i = W_dec_i + b_dec (b_dec is the mean) lies in the convex hull of the data, and a
    reconstruction in that of the archetypes. Learnt by turns: codes a given Z, then Z by the majorisation
    ``A^T A <= diag(A^T 1)`` (it holds as rows of A sum to 1), whose minimum ``Z + A^T (X - A Z) / A^T 1`` is projected
    onto the hull of C. That and the choice of C (an archetype is on the boundary of the hull) are ours. With ``k``, the
    k archetypes of largest share are kept and solved for again. Codes have no unit; the size is the atoms'.
    """

    Config = ArchetypalConfig
    citation = "Cutler, Breiman 1994, Archetypal analysis; Mørup, Hansen 2012, Archetypal analysis for machine learning"
    good_for = "atoms that stay among the data: each is a mixture of real rows"
    scaled_codes = False  # memberships

    def learn(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        x, config = rows - mean, self.config
        generator = torch.Generator().manual_seed(int(self.seed))
        candidates = x[_extreme(x, config.n_candidates, generator)]
        chosen = _far_apart(candidates, self.n_features)
        weights = torch.nn.functional.one_hot(chosen, len(candidates)).to(x)
        atoms, codes = weights @ candidates, None
        for _ in range(config.max_iter):
            codes = simplex_codes(x, atoms, 10, start=codes)
            wanted = atoms + codes.T @ (x - codes @ atoms) / codes.sum(0).clamp_min(1e-12)[:, None]
            weights = simplex_codes(wanted, candidates, 10, start=weights)
            atoms = weights @ candidates
        self.set_atoms(atoms, mean)

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCode:
        steps = self.config.encode_steps if not self.training else max(1, self.config.encode_steps // LESS)
        shares = simplex_codes(self.check_input(x) - self.b_dec, self.W_dec, steps, self.config.k)
        return SparseCode.from_dense(shares)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        super().fold_scale(scale, out_scale)
        self.W_dec.div_(scale)


def _extreme(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Numbers of the rows that lie farthest along some of ``n`` random directions."""
    directions = torch.randn(n, x.shape[1], generator=generator).to(x)
    return (x @ directions.T).argmax(0).unique()


def _far_apart(x: Tensor, n: int) -> Tensor:
    """Numbers of ``n`` rows, each the farthest from those before it; they repeat where there are fewer rows."""
    chosen = [int(x.norm(dim=1).argmax())]
    distance = (x - x[chosen[0]]).norm(dim=1)
    while len(chosen) < n:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen, device=x.device)
