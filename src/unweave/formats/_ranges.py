"""A file that lies elsewhere, fetched as it is read: a local file of its size that is empty where nothing was read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from unweave.errors import UnweaveError

BLOCK = 1 << 14
_MAX_BYTES = 1 << 26  # headers of 64 MiB are no headers

Fetch = Callable[[int, int], tuple[bytes, int]]  # from, to: the bytes between (fewer at the end), the file's size


class RangeFile(io.RawIOBase):
    """Seekable; what is read of it is written to ``path`` at the same place, so that others can read it there.

    The rest of ``path`` is a hole, which takes no room on the disk.

    Raises:
        UnweaveError: while reading, when more than headers would be fetched, or the size is not one.
    """

    def __init__(self, path: Path, fetch: Fetch) -> None:
        super().__init__()
        self._path, self._fetch, self._at = path, fetch, 0
        self._had: set[int] = set()
        try:
            self._file: BinaryIO = open(path, "r+b")  # noqa: SIM115 (closed with this)
        except OSError as error:
            raise UnweaveError(f"cannot read {path}: {error.strerror or error}") from None
        self.size = BLOCK  # of what is asked for first, which tells the true one
        try:
            data, self.size = fetch(0, BLOCK)
            self._file.truncate(self.size)
            self._keep(0, data)
        except (OSError, OverflowError) as error:
            self.close()
            raise UnweaveError(
                f"{path}: said to be of {self.size:,} bytes, which cannot be a file here ({error})"
            ) from None
        except BaseException:
            self.close()
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError("a place before the start of the file")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        stop = self.size if size is None or size < 0 else min(self.size, self._at + size)
        if stop <= self._at:
            return b""
        self._need(self._at, stop)
        self._file.seek(self._at)
        data = self._file.read(stop - self._at)
        self._at = stop
        return data

    def close(self) -> None:
        self._file.close()
        super().close()

    def _need(self, start: int, stop: int) -> None:
        asked = range(start // BLOCK, -(-stop // BLOCK))
        blocks = [b for b in asked if b not in self._had] if len(asked) * BLOCK <= _MAX_BYTES else asked
        if (len(self._had) + len(blocks)) * BLOCK > _MAX_BYTES:
            raise UnweaveError(
                f"{self._path}: expected headers of at most {_MAX_BYTES:,} bytes, it has more; download it to read it"
            )
        while blocks:
            n = next((i for i, b in enumerate(blocks) if b != blocks[0] + i), len(blocks))  # that follow each other
            first, blocks = blocks[0] * BLOCK, blocks[n:]
            data, size = self._fetch(first, min(self.size, first + n * BLOCK))
            if size != self.size:
                raise UnweaveError(f"{self._path}: it had {self.size:,} bytes and has {size:,} now; try again")
            self._keep(first, data)

    def _keep(self, start: int, data: bytes) -> None:
        self._file.seek(start)
        self._file.write(data)
        self._file.flush()
        self._had.update(range(start // BLOCK, -(-(start + len(data)) // BLOCK)))
