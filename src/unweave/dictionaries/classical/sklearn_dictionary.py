"""scikit-learn's dictionary learning, coded by orthogonal matching pursuit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries.classical._base import AtomDictionary, Classical, ClassicalConfig, scikit_learn
from unweave.dictionaries.registry import register
from unweave.kernels.backend import serves
from unweave.kernels.pursuit import reference

_CHUNK = 2048  # rows: a pursuit holds a basis for each


class SklearnDictionaryConfig(ClassicalConfig):
    """
    Attributes:
        k: features a row; a tenth of d_in when None, as in scikit-learn.
        alpha: weight of the L1 penalty while learning, beside half the squared error. None: ``1 / sqrt(d_in)``, which
            is scikit-learn's 1 for rows of squared norm 1 rather than d_in.
        batch_size, max_iter: of the mini-batches, and the passes over the sample.
    """

    alpha: PositiveFloat | None = None
    batch_size: PositiveInt = 256
    max_iter: PositiveInt = 20


@register("sklearn_dictionary")
class SklearnDictionary(Classical, AtomDictionary):
    """``min 1/2 ||x - z W_dec||^2 + alpha ||z||_1`` over codes and unit atoms, online (MiniBatchDictionaryLearning).

    Rows are centred on their mean, which scikit-learn leaves to its user. The code is that of orthogonal matching
    pursuit with k atoms, scikit-learn's own default, of either sign.
    """

    Config = SklearnDictionaryConfig
    citation = "Mairal, Bach, Ponce, Sapiro 2009, Online dictionary learning for sparse coding"
    good_for = "scikit-learn's online dictionary learning: the classical rival with an iterated code"

    def learn(self, rows: Tensor) -> None:
        rows, config = rows.double().cpu(), self.config  # float32 cannot meet the tolerances of its inner loop
        mean = rows.mean(0)
        fitted = scikit_learn("decomposition", "MiniBatchDictionaryLearning")(
            n_components=self.n_features,
            alpha=config.alpha or self.d_in**-0.5,
            batch_size=min(config.batch_size, len(rows)),
            max_iter=config.max_iter,
            fit_algorithm="cd",
            transform_max_iter=10_000,
            random_state=int(self.seed),
        ).fit((rows - mean).numpy())
        self.set_atoms(F.normalize(torch.from_numpy(fitted.components_).to(mean), dim=1), mean)

    def encode(self, x: Tensor) -> SparseCode:
        x = (self.check_input(x) - self.b_dec).detach()
        W, k = self.W_dec.detach(), self.config.k or max(1, self.d_in // 10)
        pursue = reference.orthogonal_matching_pursuit
        if serves("cpu", W):
            from unweave.kernels.pursuit import cpu

            pursue = cpu.orthogonal_matching_pursuit
        parts = [pursue(part, W, k, signed=True) for part in x.split(_CHUNK)] if len(x) else [pursue(x, W, k)]
        return SparseCode.concatenate([SparseCode.from_pattern(*part) for part in parts])
