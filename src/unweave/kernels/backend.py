"""The three backends of the kernels, and which of them can work on a tensor."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from unweave.errors import UnweaveError

BackendName = Literal["reference", "cpu", "gpu"]
_NEEDS = {"cpu": "numba", "gpu": "triton"}


@dataclass(frozen=True)
class Backend:
    """One implementation of every operation; each attribute is a module with the functions of that operation."""

    name: str
    select: ModuleType
    rows: ModuleType
    decode: ModuleType
    csc: ModuleType
    gradients: ModuleType
    adam: ModuleType
    prefixes: ModuleType
    pursuit: ModuleType
    update: ModuleType


@cache
def backend(name: BackendName) -> Backend:
    """Import a backend: "reference" (plain PyTorch), "cpu" (numba), "gpu" (Triton).

    Raises:
        UnweaveError: when the package behind it is missing or does not import.
    """
    try:
        parts = {
            op: importlib.import_module(f"unweave.kernels.{op}.{name}")
            for op in Backend.__dataclass_fields__
            if op != "name"
        }
    except Exception as error:  # numba also raises others, where it finds no place for its cache
        needs = _NEEDS.get(name, name)
        raise UnweaveError(f"the {name!r} kernels need {needs}: {error}. Try `pip install {needs}`.") from error
    return Backend(name, **parts)


@cache
def why_not(name: BackendName) -> str | None:
    """Why a backend cannot be used here; None when it can."""
    if name == "gpu" and not torch.cuda.is_available():
        return "no CUDA device"
    if name in _NEEDS and importlib.util.find_spec(_NEEDS[name]) is None:
        return f"{_NEEDS[name]} is not installed"
    try:
        backend(name)
    except UnweaveError as error:
        return str(error)
    return None


def has_fast_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False


def serves(name: BackendName, tensor: Tensor) -> bool:
    """Whether a backend takes this tensor: the compiled ones want float32 on their own device."""
    if name == "reference":
        return True
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == {"cpu": "cpu", "gpu": "cuda"}[name]
        and why_not(name) is None
    )


def fastest(tensor: Tensor) -> Backend:
    """The compiled backend for a tensor, or the reference where there is none or ``UNWEAVE_KERNELS`` asks for it."""
    if os.environ.get("UNWEAVE_KERNELS") == "reference":
        return backend("reference")
    name: BackendName = "gpu" if tensor.is_cuda else "cpu"
    return backend(name if serves(name, tensor) else "reference")
