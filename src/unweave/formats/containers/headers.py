"""Which bytes of a file say what is in it: for files that lie elsewhere and are fetched as they are read."""

from __future__ import annotations

import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from unweave.formats.containers.archive import is_archive, members
from unweave.formats.containers.opening import is_safetensors
from unweave.formats.containers.pickled import MAX_PICKLE
from unweave.formats.containers.safetensors import MAX_HEADER, open_safetensors

SMALL = 64  # bytes: a tensor of no more (a k, a threshold) is read with the headers
_START = 4096  # bytes of a file in an archive in which numpy's header ends, and small tensors do
_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)


def read_headers(file: BinaryIO, path: Path) -> None:
    """Read of a file all that :func:`open_tensors` needs, and its small tensors.

    What is wrong with the file is left for ``open_tensors`` to say.

    Args:
        file: seekable; writes what is read of it to ``path``, a file of the same size.

    Raises:
        UnweaveError: for a dangerous or damaged header.
    """
    start = file.read(9)
    if is_archive(path):
        _read_archive(file, path)
    elif is_safetensors(start, path) and (length := int.from_bytes(start[:8], "little")) <= MAX_HEADER:
        file.seek(8)
        file.read(length)
        for begin, end in open_safetensors(path).spans.values():
            if end - begin <= SMALL:
                file.seek(begin)
                file.read(end - begin)


def _read_archive(file: BinaryIO, path: Path) -> None:
    with suppress(*_ERRORS):
        zipfile.ZipFile(file).close()  # its directory
    found = members(path)
    with suppress(*_ERRORS), zipfile.ZipFile(file) as archive:
        for info in found:
            program = info.filename.rpartition("/")[2] == "data.pkl" and info.file_size <= MAX_PICKLE
            # Checksums are not compared here: torch can be told to write none.
            with suppress(*_ERRORS), archive.open(info) as member:
                member.read(info.file_size if program else min(info.file_size, _START))
