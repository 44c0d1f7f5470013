"""``metrics.jsonl``: one JSON line a log step, in step with the checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from unweave.errors import UnweaveError


class MetricsLog:
    """The lines logged so far, kept in memory and appended to a file.

    A resumed run cuts the file back to the checkpoint's :meth:`cursor`, so that no line repeats and a line that a
    kill cut short disappears.

    Args:
        path: the file; None keeps the lines in memory only.
        cursor: bytes of an existing file to keep.
    """

    def __init__(self, path: Path | None, cursor: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path, self._file = path, None
        if path is None:
            return
        kept = path.read_bytes()[:cursor] if cursor and path.is_file() else b""
        kept = kept[: kept.rfind(b"\n") + 1]
        self.lines = [json.loads(line) for line in kept.splitlines()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if path.is_file() else "wb")
            self._file.truncate(len(kept))
            self._file.seek(len(kept))
        except OSError as error:
            raise self._cannot_write(error) from None

    def append(self, line: dict[str, Any]) -> None:
        """Add one line; NaN and infinity, which JSON has not, become null."""
        line = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self.lines.append(line)
        if self._file is not None:
            try:
                self._file.write((json.dumps(line) + "\n").encode())
                self._file.flush()
            except OSError as error:
                raise self._cannot_write(error) from None

    def cursor(self) -> int:
        """Bytes written, after making sure that they are on the disk."""
        if self._file is None:
            return 0
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from None
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _cannot_write(self, error: OSError) -> UnweaveError:
        return UnweaveError(
            f"cannot write {self._path}: {error.strerror or error}. Free some space (or choose another folder) and "
            "run the same command again: training goes on from its last checkpoint."
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; lines that were cut short are left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
