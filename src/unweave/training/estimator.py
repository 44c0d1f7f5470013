"""A scikit-learn transformer: sparse codes of rows, for pipelines, grid searches and everything built on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from unweave.training._rows import rows_of
from unweave.training.fit import batch_size_for, fit_rows

_CHUNK = 8192  # rows encoded at a time


class SparseDictionaryTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Learn a sparse dictionary and write each row as a few of its atoms.

    Follows scikit-learn's names: ``n_components`` is the number of features of the dictionary, ``n_features_in_``
    the width of the rows. ``transform`` works in float64, so a row's code does not depend on the rows around it.

    Args:
        n_components: size of the dictionary; 8 times the width of the rows when None.
        arch: "batch_topk", "topk", "jumprelu", "relu" or any other registered architecture.
        k: components per row to aim at; when None, an eighth of the row's width, at most 32.
        max_iter: optimiser steps; when None, one pass over the data, but at least 1,500 steps or 300 passes,
            whichever is less.
        batch_size: rows a step; when None, a sixteenth of the data, from 32 to 2048.
        options: a dict of further fields of the architecture's or the training's config.
        sparse_output: return a ``scipy.sparse.csr_matrix``. scikit-learn's ``set_output("pandas")`` needs False.
        random_state: int, RandomState or None.
        device: "cpu", "cuda" or "auto".

    Attributes:
        components_: ``(n_components, n_features_in_)``, the atoms.
        dictionary_: the :class:`~unweave.dictionaries.Dictionary`, in float64 on the CPU.
        n_iter_: steps done.
        metrics_: what was logged while training. health_: what looked wrong.

    >>> codes = SparseDictionaryTransformer(n_components=256, k=8).fit_transform(X)     # doctest: +SKIP
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        arch: str = "batch_topk",
        k: int | None = None,
        max_iter: int | None = None,
        batch_size: int | None = None,
        options: dict[str, Any] | None = None,
        sparse_output: bool = True,
        random_state: Any = None,
        device: str = "cpu",
    ) -> None:
        self.n_components = n_components
        self.arch = arch
        self.k = k
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.options = options
        self.sparse_output = sparse_output
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any = None) -> SparseDictionaryTransformer:
        """Learn the dictionary from ``X (n, d)``; ``y`` is ignored."""
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        rows = rows_of(X)
        options = dict(self.options or {})
        if self.batch_size is not None:
            options["batch_size"] = self.batch_size
        options.setdefault("batch_size", batch_size_for(len(X)))
        trained = fit_rows(
            rows,
            self.arch,
            n_features=self.n_components if self.n_components is not None else 8 * X.shape[1],
            k=self.k,
            n_rows=None if self.max_iter is None else self.max_iter * options["batch_size"],
            epochs=None,
            folder=None,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            device=self.device,
            trackers=(),
            options=options,
        )
        self.dictionary_ = trained.dictionary.cpu().double()
        self.components_ = self.dictionary_.decoder_directions().numpy().copy()
        self.n_iter_ = trained.config.n_steps
        self.metrics_, self.health_ = trained.metrics, trained.health
        return self

    def transform(self, X: Any) -> Any:
        """Codes of ``X (n, d)``: ``(n, n_components)``, a ``csr_matrix`` or an array, in float64."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        parts = []
        with torch.inference_mode():
            for i in range(0, len(X), _CHUNK):
                code = self.dictionary_.encode(torch.from_numpy(np.array(X[i : i + _CHUNK], dtype=np.float64)))
                parts.append(code.nonzero().to_scipy())
        codes = scipy.sparse.csr_matrix(scipy.sparse.vstack(parts)) if len(parts) > 1 else parts[0]
        return codes if self.sparse_output else codes.toarray()

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Rows ``(n, n_features_in_)`` from codes ``(n, n_components)``, sparse or dense."""
        from unweave.codes import SparseCode

        check_is_fitted(self)
        X = check_array(X, accept_sparse="csr", dtype=np.float64)  # pyright: ignore[reportArgumentType]
        if X.shape[1] != len(self.components_):
            raise ValueError(f"expected codes of {len(self.components_)} components, found {X.shape[1]}")
        codes: Any = scipy.sparse.csr_matrix(X)
        parts = []
        with torch.inference_mode():
            for i in range(0, codes.shape[0], _CHUNK):
                part = codes[i : i + _CHUNK]
                offsets, indices = torch.from_numpy(part.indptr.astype(np.int64)), torch.from_numpy(part.indices)
                code = SparseCode(indices, torch.from_numpy(part.data), offsets, codes.shape[1])
                parts.append(self.dictionary_.decode(code).numpy())
        return np.concatenate(parts)

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)
