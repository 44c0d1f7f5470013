"""Where a run came from: versions, hardware, model, data, site, seed."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from unweave.files import read_json, write_json

_PACKAGES = ("unweave", "torch", "transformers", "tokenizers", "safetensors", "numpy", "numba", "pyarrow")


def environment() -> dict[str, Any]:
    """Versions and hardware, without the name of the machine or of a person."""
    import torch

    from unweave.kernels.calibration import processor

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    hardware = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {"versions": versions, "hardware": hardware}


def update_provenance(folder: Path, **facts: Any) -> dict[str, Any]:
    """Add facts to ``provenance.json``; groups such as ``stages`` are merged key by key."""
    path = folder / "provenance.json"
    begun: dict[str, Any] = {"format": "unweave.provenance/1", "started": now()}
    values: dict[str, Any] = read_json(path) if path.is_file() else begun
    for key, fact in facts.items():
        there = values.get(key)
        values[key] = {**there, **fact} if isinstance(there, dict) and isinstance(fact, dict) else fact
    write_json(path, values)
    return values


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
