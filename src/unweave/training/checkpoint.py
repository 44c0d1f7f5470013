"""Checkpoints: the whole state of a training run in one safetensors file.

One file, so that one rename replaces the old checkpoint by the new: a kill at any moment leaves one whole checkpoint.
Tensors are stored under their path in the state (``ring/rows``); the rest of the state is JSON in the file's header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from unweave.errors import UnweaveError
from unweave.files import read_tensors, write_tensors

FORMAT = "unweave.checkpoint/1"
_TENSOR = "$tensor"


def write_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state made of dicts, lists, tensors and JSON values; the previous file stays until this one is whole.

    Raises:
        UnweaveError: when the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _take_tensors(state, "", tensors)
    write_tensors(path, tensors, {"format": FORMAT, "state": json.dumps(tree)})


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state :func:`write_checkpoint` was given (tuples come back as lists, tensors on the CPU).

    Raises:
        UnweaveError: when the file is missing, damaged or of another format.
    """
    from safetensors import safe_open

    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise UnweaveError(f"{path} is not a checkpoint of format {FORMAT!r}; move it away to train from the start")
    return _put_tensors(json.loads(metadata["state"]), tensors)


def _take_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A clone, because safetensors refuses tensors that share memory (views of one buffer, tied weights).
        shared = any(value.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in tensors.values())
        tensors[name] = value.detach().clone() if shared else value.detach()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {str(key): _take_tensors(v, f"{name}/{key}" if name else str(key), tensors) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_take_tensors(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _put_tensors(v, tensors) for key, v in value.items()}
    if isinstance(value, list):
        return [_put_tensors(v, tensors) for v in value]
    return value
