"""SparseCode: what every encoder returns."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.files import read_tensors, write_tensors
from unweave.kernels.backend import fastest
from unweave.kernels.pattern import Pattern, concatenate

if TYPE_CHECKING:
    import scipy.sparse


class SparseCode:
    """The sparse codes of ``n`` rows in compressed sparse row (CSR) form.

    Row ``i`` owns the entries ``offsets[i]:offsets[i + 1]`` of ``indices`` and ``values``. A row may be empty, and a
    value may be an explicit zero (a TopK row with fewer than k positive pre-activations): a feature *fires* where
    its value is not zero. Values may be negative.

    Args:
        indices: ``(nnz,)`` integers, the feature of each entry; no feature twice in a row.
        values: ``(nnz,)`` floats.
        offsets: ``(n + 1,)`` integers, from 0 to nnz, never decreasing.
        n_features: the number of columns.

    Raises:
        UnweaveError: when shapes, offsets or indices do not fit together.
    """

    __slots__ = ("_pattern", "values")

    def __init__(self, indices: Tensor, values: Tensor, offsets: Tensor, n_features: int) -> None:
        if indices.ndim != 1 or values.shape != indices.shape or offsets.ndim != 1 or len(offsets) == 0:
            raise UnweaveError(
                "SparseCode: expected indices (nnz,), values (nnz,), offsets (n + 1,), found "
                f"{tuple(indices.shape)}, {tuple(values.shape)}, {tuple(offsets.shape)}"
            )
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(indices) or bool((offsets.diff() < 0).any()):
            raise UnweaveError(f"SparseCode: offsets must rise from 0 to nnz = {len(indices)}")
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= n_features):
            raise UnweaveError(
                f"SparseCode: indices must lie in [0, {n_features}), found {int(indices.min())}..{int(indices.max())}"
            )
        self._pattern = Pattern(offsets.long(), indices.int(), int(n_features))
        self.values = values

    @classmethod
    def from_pattern(cls, pattern: Pattern, values: Tensor) -> SparseCode:
        """Wrap a pattern that is known to be valid, without checks (the hot path)."""
        code = object.__new__(cls)
        code._pattern = pattern
        code.values = values
        return code

    @classmethod
    def from_fixed_k(cls, indices: Tensor, values: Tensor, n_features: int) -> SparseCode:
        """From ``(n, k)`` indices and values: CSR with equal rows."""
        n, k = indices.shape
        offsets = torch.arange(0, n * k + 1, k, device=indices.device) if k else indices.new_zeros(n + 1).long()
        return cls(indices.reshape(-1), values.reshape(-1), offsets, n_features)

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCode:
        """From an ``(n, n_features)`` tensor; zeros are left out."""
        rows, columns = dense.nonzero(as_tuple=True)
        offsets = torch.zeros(len(dense) + 1, dtype=torch.long, device=dense.device)
        offsets[1:] = torch.bincount(rows, minlength=len(dense)).cumsum(0)
        return cls(columns, dense[rows, columns], offsets, dense.shape[1])

    @classmethod
    def from_scipy(cls, matrix: Any) -> SparseCode:
        matrix = matrix.tocsr()
        matrix.sum_duplicates()
        return cls(
            torch.from_numpy(matrix.indices.astype("int32")),
            torch.from_numpy(matrix.data.copy()),
            torch.from_numpy(matrix.indptr.astype("int64")),
            matrix.shape[1],
        )

    @classmethod
    def empty(cls, n_rows: int, n_features: int, dtype: torch.dtype = torch.float32) -> SparseCode:
        """``n_rows`` rows without an entry."""
        offsets = torch.zeros(n_rows + 1, dtype=torch.long)
        return cls(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=dtype), offsets, n_features)

    @staticmethod
    def concatenate(codes: Sequence[SparseCode]) -> SparseCode:
        """Stack codes of equal ``n_features`` row-wise."""
        if not codes:
            raise UnweaveError("SparseCode.concatenate: expected at least one code, found none")
        widths = {code.n_features for code in codes}
        if len(widths) > 1:
            raise UnweaveError(f"SparseCode.concatenate: codes differ in n_features: {sorted(widths)}")
        pattern = concatenate([code.pattern for code in codes])
        return SparseCode.from_pattern(pattern, torch.cat([c.values for c in codes]))

    # ---- what it is -------------------------------------------------------------------------------------------

    @property
    def pattern(self) -> Pattern:
        """Where the entries are, without their values."""
        return self._pattern

    @property
    def indices(self) -> Tensor:
        """``(nnz,)`` int32, the feature of each entry."""
        return self._pattern.indices

    @property
    def offsets(self) -> Tensor:
        """``(n + 1,)`` int64, where each row starts."""
        return self._pattern.offsets

    @property
    def rows(self) -> Tensor:
        """``(nnz,)`` int64, the row of each entry."""
        return self._pattern.rows

    @property
    def n_features(self) -> int:
        return self._pattern.n_features

    @property
    def nnz(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.n_features

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        l0 = float(self.l0().float().mean()) if len(self) else 0.0
        return f"SparseCode({len(self):,} rows x {self.n_features:,} features, L0 {l0:.1f}, {self.dtype})"

    def l0(self) -> Tensor:
        """``(n,)`` number of features that fire in each row."""
        fired = torch.zeros(self.nnz + 1, dtype=torch.long, device=self.device)
        fired[1:] = (self.values != 0).cumsum(0)
        return fired[self.offsets[1:]] - fired[self.offsets[:-1]]

    def firing_counts(self) -> Tensor:
        """``(n_features,)`` int64, in how many rows each feature fires."""
        return fastest(self.values).csc.counts(self.indices, self.values, self.n_features)

    # ---- other forms ------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """``(n, n_features)`` tensor. For small codes: a million rows of 16k features would be 64 GB."""
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return out.index_put((self.rows, self.indices.long()), self.values, accumulate=True)

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        import scipy.sparse

        values = self.values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        parts = (values.numpy(), self.indices.cpu().numpy(), self.offsets.cpu().numpy())
        matrix = scipy.sparse.csr_matrix(parts, shape=self.shape)
        matrix.sort_indices()
        return matrix

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> SparseCode:
        pattern = self._pattern.to(device) if device is not None else self._pattern
        return SparseCode.from_pattern(pattern, self.values.to(device=device, dtype=dtype))

    def detach(self) -> SparseCode:
        return SparseCode.from_pattern(self._pattern, self.values.detach())

    def nonzero(self) -> SparseCode:
        """The same code without explicit zeros."""
        return self._keep(self.values != 0)

    def _keep(self, keep: Tensor) -> SparseCode:
        kept = torch.zeros(self.nnz + 1, dtype=torch.long, device=self.device)
        kept[1:] = keep.cumsum(0)
        pattern = Pattern(kept[self.offsets], self.indices[keep], self.n_features)
        return SparseCode.from_pattern(pattern, self.values[keep])

    # ---- slicing ----------------------------------------------------------------------------------------------

    def __getitem__(self, rows: int | slice | Tensor | Sequence[int]) -> SparseCode:
        """Rows by number, slice, boolean mask or list; always a SparseCode (one row for one number)."""
        if isinstance(rows, SupportsIndex) and getattr(rows, "ndim", 0) == 0:  # also numpy integers
            rows = operator.index(rows)
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} of a code with {len(self)} rows")
            rows = rows % len(self)
            rows = slice(rows, rows + 1)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                stop = max(start, stop)
                first, last = int(self.offsets[start]), int(self.offsets[stop])
                pattern = Pattern(self.offsets[start : stop + 1] - first, self.indices[first:last], self.n_features)
                return SparseCode.from_pattern(pattern, self.values[first:last])
            rows = torch.arange(start, stop, step, device=self.device)
        return self._take(torch.as_tensor(rows, device=self.device))

    def _take(self, rows: Tensor) -> SparseCode:
        if rows.dtype == torch.bool:
            if len(rows) != len(self):
                raise IndexError(f"mask of {len(rows)} for a code with {len(self)} rows")
            rows = rows.nonzero().squeeze(1)
        if len(rows) and (int(rows.min()) < -len(self) or int(rows.max()) >= len(self)):
            raise IndexError(f"rows {int(rows.min())}..{int(rows.max())} of a code with {len(self)} rows")
        rows = torch.where(rows < 0, rows + len(self), rows).long()
        counts = self.offsets[rows + 1] - self.offsets[rows]
        offsets = torch.zeros(len(rows) + 1, dtype=torch.long, device=self.device)
        offsets[1:] = counts.cumsum(0)
        entry = torch.arange(int(offsets[-1]), device=self.device)
        entry = entry + (self.offsets[rows] - offsets[:-1]).repeat_interleave(counts)
        return SparseCode.from_pattern(Pattern(offsets, self.indices[entry], self.n_features), self.values[entry])

    def __iter__(self) -> Iterator[SparseCode]:
        return (self[i] for i in range(len(self)))

    def feature(self, feature: int) -> Tensor:
        """``(n,)`` the values of one feature in every row, zero where it is silent."""
        out = torch.zeros(len(self), dtype=self.dtype, device=self.device)
        at = self.indices == feature
        out[self.rows[at]] = self.values[at]
        return out

    def top(self, n: int = 10) -> list[tuple[int, float]]:
        """The ``n`` features with the largest absolute value in any row, as ``(feature, value)``, largest first."""
        peaks = self.peaks()
        order = peaks.abs().argsort(descending=True, stable=True)[:n]
        return [(int(f), float(peaks[f])) for f in order if peaks[f] != 0]

    def peaks(self) -> Tensor:
        """``(n_features,)`` float32, each feature's value of largest magnitude in any row, with its sign."""
        features, values = self.indices.long(), self.values.detach().float()
        size = torch.zeros(self.n_features, device=self.device).scatter_reduce_(0, features, values.abs(), "amax")
        at_peak = values.abs() == size[features]
        return torch.zeros_like(size).index_put_((features[at_peak],), values[at_peak])

    # ---- files ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (indices, values, offsets; ``n_features`` in the metadata)."""
        tensors = {"indices": self.indices, "values": self.values, "offsets": self.offsets}
        write_tensors(path, tensors, {"n_features": str(self.n_features), "format": "unweave.code/1"})

    @classmethod
    def load(cls, path: str | Path) -> SparseCode:
        from safetensors import safe_open

        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        missing = {"indices", "values", "offsets"} - tensors.keys()
        if missing or not metadata.get("n_features", "").isdigit():
            raise UnweaveError(f"{path} holds no SparseCode: it lacks {sorted(missing) or 'n_features'}")
        return cls(tensors["indices"], tensors["values"], tensors["offsets"], int(metadata["n_features"]))
