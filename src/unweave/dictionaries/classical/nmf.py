"""NMF: parts that only ever add up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries.classical._base import (
    LESS,
    AtomDictionary,
    Classical,
    ClassicalConfig,
    scikit_learn,
)
from unweave.dictionaries.classical._solvers import nonnegative_codes
from unweave.dictionaries.registry import register


class NMFConfig(ClassicalConfig):
    """
    Attributes:
        max_iter: of the factorisation (coordinate descent).
        encode_steps: of the projected gradient that finds a row's code.
    """

    max_iter: PositiveInt = 400
    encode_steps: PositiveInt = 200


@register("nmf")
class NMF(Classical, AtomDictionary):
    """``x ~ z H`` with ``z >= 0`` and ``H >= 0``; the code is the non-negative least squares one.

    Rows with negative entries are split: with the mean taken off, ``[max(x, 0), max(-x, 0)]`` is factorised, and an
    atom is what its two halves write together, ``H+ - H-``; the mean is the bias. So features still only add up, but
    atoms have both signs. Where no row of the sample is negative, nothing is taken off and nothing split. Atoms have
    norm 1. With ``k``, the k features of the largest values are kept and solved for again.
    """

    Config = NMFConfig
    citation = "Lee, Seung 1999, Learning the parts of objects by non-negative matrix factorization"
    good_for = "parts that add up, on rows that are not negative"

    def learn(self, rows: Tensor) -> None:
        rows = rows.cpu()
        split = bool((rows < 0).any())
        offset = rows.mean(0) if split else torch.zeros_like(rows[0])
        if split:
            centred = rows - offset
            rows = torch.cat([centred.clamp_min(0), (-centred).clamp_min(0)], dim=1)
        fitted = scikit_learn("decomposition", "NMF")(
            n_components=self.n_features, max_iter=self.config.max_iter, random_state=int(self.seed)
        ).fit(rows.numpy())
        atoms = torch.from_numpy(fitted.components_).float()
        if split:
            atoms = atoms[:, : self.d_in] - atoms[:, self.d_in :]
        self.set_atoms(F.normalize(atoms, dim=1), offset)

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCode:
        steps = self.config.encode_steps if not self.training else max(1, self.config.encode_steps // LESS)
        centred = self.check_input(x) - self.b_dec
        return SparseCode.from_dense(nonnegative_codes(centred, self.W_dec, steps, self.config.k))
