"""ICA: directions along which the rows are as far from Gaussian as can be."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from unweave.dictionaries.classical._base import ClassicalConfig, LinearClassical, scikit_learn
from unweave.dictionaries.registry import register


class ICAConfig(ClassicalConfig):
    """
    Attributes:
        contrast: how distance from a Gaussian is measured.
        max_iter: of the fixed-point iteration.
    """

    contrast: Literal["logcosh", "exp", "cube"] = "logcosh"
    max_iter: PositiveInt = 400


@register("ica")
class ICA(LinearClassical):
    """``z = W (x - mean)`` with independent z (FastICA), of either sign, the k largest by magnitude if k is given.

    Atoms are the columns of the mixing matrix at norm 1, so a value is the length of its contribution. There are at
    most as many as the rows have dimensions.
    """

    Config = ICAConfig
    citation = "Hyvärinen, Oja 2000, Independent component analysis: algorithms and applications"
    good_for = "independent directions, as many as there are dimensions: the classical rival"

    def learn(self, rows: Tensor) -> None:
        rows = rows.double().cpu()
        mean = rows.mean(0)
        lengths = torch.linalg.svdvals(rows - mean)
        rank = int((lengths > 1e-6 * lengths[:1].clamp_min(1e-30)).sum())
        n = min(self.n_features, rank)
        if n == 0:  # the rows do not vary
            self.set_atoms(self.W_enc[:0], self.W_dec[:0], mean)
            return
        config = self.config
        fitted = scikit_learn("decomposition", "FastICA")(
            n_components=n,
            whiten="unit-variance",
            fun=config.contrast,
            max_iter=config.max_iter,
            random_state=int(self.seed),
        ).fit(rows.numpy())
        atoms, encoder = torch.from_numpy(fitted.mixing_.T.copy()), torch.from_numpy(fitted.components_.copy())
        norms = atoms.norm(dim=1, keepdim=True)
        self.set_atoms(encoder * norms, atoms / norms, mean)
