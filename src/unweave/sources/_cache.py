"""Folders in the cache that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from unweave.errors import UnweaveError


def cached_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """``target``, built once: ``build(folder)`` fills a temporary folder beside it, which is then renamed.

    A crash or a full disk leaves no half-built folder behind; of two processes that build at once, one wins.

    Raises:
        UnweaveError: when the cache cannot be written.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _cannot_write(target, error) from None
    try:
        build(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as written:
                    os.fsync(written.fileno())
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else somebody else built the same folder first
                raise
    except OSError as error:
        raise _cannot_write(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _cannot_write(target: Path, error: OSError) -> UnweaveError:
    return UnweaveError(
        f"cannot write {target}: {error.strerror or error}. Free some space, or set UNWEAVE_CACHE to another folder."
    )
