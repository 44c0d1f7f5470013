"""safetensors: eight bytes with the length of a JSON header, the header, the raw values.

The header is read and checked here, so that a file of many gigabytes is known in milliseconds; values are read by the
safetensors library, one tensor at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.formats.containers._info import ITEM_BYTES, TensorInfo, Tensors

MAX_HEADER = 1 << 24  # 16 MiB: a hundred thousand tensors
_MAX_VALUES = 1 << 48


class SafetensorsFile(Tensors):
    """
    Attributes:
        spans: where in the file each tensor's bytes begin and end.
    """

    spans: dict[str, tuple[int, int]]

    def _raw(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise UnweaveError(f"{self.path}: cannot read {name!r} ({error}); fetch the file again") from None

    def _slice(self, name: str, first: int, stop: int) -> Tensor:
        from safetensors import SafetensorError, safe_open

        unsigned = self.info[name].dtype in ("U16", "U32", "U64")  # torch knows these by name and can do little else
        try:
            with safe_open(self.path, framework="np" if unsigned else "pt") as file:
                found: Any = file.get_slice(name)[first:stop]
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise UnweaveError(f"{self.path}: cannot read {name!r} ({error}); fetch the file again") from None
        return torch.from_numpy(found.astype("int64")) if unsigned else found.clone()


def open_safetensors(path: Path) -> SafetensorsFile:
    """The header of a file, checked.

    Raises:
        UnweaveError: for a file cut short, tensors that overlap, leave gaps or reach beyond the end, a shape that does
            not fit its bytes, a dtype nobody knows, or a header that is not one.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise _broken(
                path, f"its header claims {length:,} bytes, the file has {max(0, size - 8):,} after the length"
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not an object of names and tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "its __metadata__ is not words by name")
    spans, info = [], {}
    for name, entry in header.items():
        info[name], start, stop = _entry(path, name, entry)
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "overlaps the one before it" if start < end else "leaves a gap before it"
            raise _broken(path, f"tensor {name!r} {what} (starts at {start:,}, expected {end:,})")
        end = stop
    if end != size - 8 - length:
        raise _broken(path, f"its tensors need {end:,} bytes, it has {size - 8 - length:,}")
    opened = SafetensorsFile(path, info, metadata=metadata)
    opened.spans = {name: (8 + length + start, 8 + length + stop) for start, stop, name in spans}
    return opened


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if not isinstance(entry, dict):
        raise _broken(path, f"tensor {name!r} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _broken(path, f"tensor {name!r} has the dtype {str(dtype)[:40]!r}, known: {', '.join(ITEM_BYTES)}")
    if not (_naturals(shape) and _naturals(offsets)) or len(offsets) != 2:
        raise _broken(path, f"the shape or the offsets of tensor {name!r} are not natural numbers")
    info = TensorInfo(dtype, tuple(shape))
    if info.n_values > _MAX_VALUES or offsets[1] - offsets[0] != info.n_bytes:
        found = f"{offsets[1] - offsets[0]:,}"
        raise _broken(path, f"tensor {name!r} of shape {str(shape)[:60]} and dtype {dtype} has {found} bytes")
    return info, offsets[0], offsets[1]


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= _MAX_VALUES for v in values)
    )


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands there twice")
    return made


def _broken(path: Path, why: str) -> UnweaveError:
    return UnweaveError(
        f"{path} is not a whole safetensors file: {why[:400]}; it is cut short or damaged, fetch it again"
    )
