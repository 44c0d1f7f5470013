"""What the timings were taken on and with, for the record."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import torch

from .base import version

PACKAGES = (
    *("unweave", "torch", "numpy", "numba", "eai-sparsify", "sae-lens", "dictionary-learning", "overcomplete"),
    *("llamascopium", "transformers", "transformer-lens", "nnsight"),
)
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def describe() -> dict[str, Any]:
    """JSON-able: processor, instruction sets, cores, memory, threads, versions, load."""
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in (_cpu_field("flags") or "").split()],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch_threads": torch.get_num_threads(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "load": load(),
    }


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def _cpu_field(name: str) -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return None
    lines = (line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    return next((value.strip() for key, value in lines if key.strip() == name), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
