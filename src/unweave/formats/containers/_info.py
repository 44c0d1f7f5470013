"""What every container gives: names, shapes and dtypes at once, values when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unweave.errors import UnweaveError

# Names as in safetensors, and the bytes of one element.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
ITEM_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
FLOATS = frozenset(name for name in ITEM_BYTES if name.startswith(("F", "BF")))


class TensorInfo(NamedTuple):
    """Dtype (safetensors' name for it) and shape of a tensor that nobody has read yet."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_values * ITEM_BYTES[self.dtype]


class Tensors(Mapping[str, Tensor]):
    """The tensors of one file. Looking one up reads it, as float32 if it holds floats, and refuses NaN and infinity.

    Attributes:
        path: the file. info: every tensor's dtype and shape, known from headers alone.
        values_beside: whatever else the file holds (a ``.pt`` may: numbers, words), by name.
        metadata: the words in a safetensors header.
    """

    def __init__(
        self,
        path: Path,
        info: Mapping[str, TensorInfo],
        values: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.info = path, dict(info)
        self.values_beside, self.metadata = dict(values or {}), dict(metadata or {})

    def _raw(self, name: str) -> Tensor:
        raise NotImplementedError

    def stored_bytes(self, name: str) -> int:
        """How much of the file has to be there for a tensor to be read."""
        return self.info[name].n_bytes

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.info:
            found = ", ".join(sorted(self.info)[:12]) or "none"
            raise UnweaveError(f"{self.path}: expected a tensor {name!r}, found {found}")
        tensor = self._raw(name)
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor.sum())):  # a sum is one pass; look closer only when it overflows
            n_bad = int((~torch.isfinite(tensor)).sum())
            if n_bad:
                raise UnweaveError(
                    f"{self.path}: {n_bad:,} of the {tensor.numel():,} values of {name!r} are NaN or infinite; "
                    "the training went wrong or the file is damaged, fetch it again"
                )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    def __contains__(self, name: object) -> bool:
        return name in self.info

    def shape(self, name: str, n_dimensions: int) -> tuple[int, ...]:
        """The shape of a tensor, refused if it has another number of dimensions."""
        if name not in self.info:
            self[name]
        shape = self.info[name].shape
        if len(shape) != n_dimensions or 0 in shape:
            raise UnweaveError(
                f"{self.path}: expected {name!r} to have {n_dimensions} dimensions, none of them empty, found {shape}"
            )
        return shape

    def read(self, name: str, *shape: int) -> Tensor:
        """A tensor of floats of exactly this shape."""
        info = self.info.get(name)
        if info is not None and (info.shape != shape or info.dtype not in FLOATS):
            raise UnweaveError(
                f"{self.path}: expected {name!r} to be floats of shape {shape}, found {info.dtype} of {info.shape}"
            )
        return self[name]

    def unset(self, name: str) -> bool:
        """Whether a tensor is not there, or holds NaN alone, which is how some libraries say that there is none."""
        return name not in self.info or bool(self._raw(name).isnan().all())

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows ``first`` to ``stop`` (or the end) in the dtype they lie there in; unsigned integers as int64."""
        if name not in self.info:
            self[name]
        return self._slice(name, first, min(stop, self.info[name].shape[0]))

    def _slice(self, name: str, first: int, stop: int) -> Tensor:
        return self._raw(name)[first:stop]

    def number(self, name: str) -> float:
        """A tensor of one element as a number."""
        if name in self.info and self.info[name].n_values != 1:
            raise UnweaveError(f"{self.path}: expected {name!r} to be one number, found shape {self.info[name].shape}")
        return float(self[name].reshape(()))
