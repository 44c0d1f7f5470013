"""``.pt``, ``.pth``, ``.bin``: what ``torch.save`` writes, read through ``weights_only`` and nothing else.

A pickle is a program. torch's ``weights_only`` reader knows tensors, numbers, words and their containers and refuses
everything else; the archive around it is checked first, the tensors' sizes afterwards.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.formats.containers._info import TensorInfo, Tensors
from unweave.formats.containers.archive import ARCHIVE, is_archive, members

MAX_PICKLE = 1 << 24
_MAX_DEPTH = 6
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_DTYPES |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


class PickledFile(Tensors):
    def __init__(self, path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        info = {name: TensorInfo(_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        super().__init__(path, info, values)
        self._tensors = tensors

    def _raw(self, name: str) -> Tensor:
        return self._tensors[name].detach().clone()  # not a window into a file that may go away

    def _slice(self, name: str, first: int, stop: int) -> Tensor:
        return self._tensors[name][first:stop].detach().clone()

    def stored_bytes(self, name: str) -> int:
        return self._tensors[name].untyped_storage().nbytes()  # it may be a view of more


def open_pickled(path: Path, data: BytesIO | None = None) -> PickledFile:
    """The tensors in a file, by name, with dots between the names of nested dictionaries.

    The values stay on disk until they are asked for.

    Args:
        data: what is read instead of the whole file, where only a part of it is such an archive.

    Raises:
        UnweaveError: for a file that is more than tensors and plain values, of a torch before 1.6, or damaged.
    """
    if not (is_archive(path) if data is None else data.getbuffer()[:4] == ARCHIVE):
        raise UnweaveError(
            f"{path} is not an archive as torch >= 1.6 writes it: it is damaged, or a bare pickle, which can run any "
            "program when read. Load it where you trust it and save it again with torch.save or safetensors"
        )
    found = members(path, stored=True, data=data)
    pickles = [i for i in found if i.filename.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE:
        raise UnweaveError(f"{path}: expected one data.pkl of at most {MAX_PICKLE:,} bytes, as torch.save writes it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if data is not None:
                data.seek(0)
            source, mapped = (path, True) if data is None else (data, False)
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever torch's readers raise on damaged files: dozens of kinds
        reason = " ".join(str(error).split())[:160]
        raise UnweaveError(
            f"{path}: refused, it is damaged or holds more than tensors and plain values ({type(error).__name__}: "
            f"{reason}). Load it where you trust it and save its state_dict() again"
        ) from None
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    try:
        _sort_out(path, "", loaded, tensors, values, 0)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise UnweaveError(f"{path}: its tensors are damaged ({error})") from None
    return PickledFile(path, tensors, values)


def _sort_out(
    path: Path, name: str, thing: Any, tensors: dict[str, Tensor], values: dict[str, Any], depth: int
) -> None:
    if isinstance(thing, Tensor):
        tensors[name or "tensor"] = _checked(path, name, thing)
    elif isinstance(thing, dict) and depth < _MAX_DEPTH and len(tensors) + len(values) < 10_000:
        for key, value in thing.items():
            if isinstance(key, str) and len(key) <= 400:
                _sort_out(path, f"{name}.{key}" if name else key, value, tensors, values, depth + 1)
    elif isinstance(thing, (bool, int, float, str)) or thing is None or _plain_list(thing):
        values[name or "value"] = thing


def _plain_list(thing: Any) -> bool:
    return isinstance(thing, (list, tuple)) and len(thing) < 10_000 and all(isinstance(v, (int, float)) for v in thing)


def _checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    if (
        tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.device.type != "cpu"
        or tensor.dtype not in _DTYPES
    ):
        raise UnweaveError(f"{path}: {name!r} is {tensor.layout}, {tensor.dtype}; expected an ordinary tensor")
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise UnweaveError(f"{path}: {name!r} is a {type(tensor).__name__}, expected an ordinary tensor")
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        raise UnweaveError(
            f"{path}: {name!r} claims the shape {tuple(tensor.shape)} but has {held:,} bytes; do not trust this file"
        )
    return tensor
