"""A line of JSON, then what ``torch.save`` writes: saev's one file for settings and weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

from unweave.errors import UnweaveError
from unweave.formats.containers.pickled import PickledFile, open_pickled

_MAX_LINE = 1 << 20


def open_headed(path: Path) -> PickledFile:
    """The tensors after the first line, by the reader for any ``.pt``; the line is ``values_beside["header"]``.

    Raises:
        UnweaveError: when the line is no JSON of names and values, or what follows is refused.
    """
    with open(path, "rb") as file:
        line = file.readline(_MAX_LINE + 1)
        data = file.read()
    try:
        if len(line) > _MAX_LINE or not line.endswith(b"\n"):
            raise ValueError(f"it has no end within {_MAX_LINE:,} bytes")
        header = json.loads(line)
        if not isinstance(header, dict):
            raise ValueError(f"expected names and values, found {str(header)[:60]}")
    except (ValueError, RecursionError) as error:
        raise UnweaveError(
            f"{path}: expected a line of JSON and then what torch.save writes ({' '.join(str(error).split())[:160]}); "
            "the file is damaged, fetch it again"
        ) from None
    tensors = open_pickled(path, io.BytesIO(data))
    tensors.values_beside["header"] = header
    return tensors
