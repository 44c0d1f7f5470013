"""A folder of columns: one ``.npy`` file each, named in a manifest that is written last.

A column is memory-mapped when it is first asked for. The folder is made beside its final place and renamed there
when it is whole, so a killed build leaves nothing that opens.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from unweave.errors import UnweaveError
from unweave.files import read_json, sha256_file, write_json

FORMAT = "unweave.features/1"
MANIFEST = "manifest.json"
_HEADER = 128  # bytes; fixed, so that it can be written when the length is known
_STALE_SECONDS = 3600.0


class ColumnWriter:
    """Appends to one ``.npy`` column whose length is known only at the end.

    Args:
        path: the file. dtype: of the elements. width: elements per row, None for a plain vector.
    """

    def __init__(self, path: Path, dtype: str, width: int | None = None) -> None:
        self.path, self.dtype, self.width, self.length = path, np.dtype(dtype), width, 0
        self._file: BinaryIO | None = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._file.write(bytes(_HEADER))

    def append(self, values: np.ndarray) -> None:
        assert self._file is not None, "the column is closed"
        values = np.ascontiguousarray(values, dtype=self.dtype)
        self._file.write(values.data if values.size else b"")
        self.length += len(values)

    def close(self) -> None:
        if self._file is None:
            return
        shape = (self.length,) if self.width is None else (self.length, self.width)
        text = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        body = text.encode("latin1").ljust(_HEADER - 11) + b"\n"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_column(folder: Path, name: str, values: np.ndarray) -> None:
    writer = ColumnWriter(folder / f"{name}.npy", values.dtype.str, values.shape[1] if values.ndim == 2 else None)
    try:
        writer.append(values)
    finally:
        writer.close()


class Columns:
    """The columns of a folder by name, memory-mapped at first use: ``columns["tokens"]``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._open:
            path = self.folder / f"{name}.npy"
            try:
                # Copy-on-write, never saved: torch warns about read-only memory. A plain view indexes faster.
                self._open[name] = np.load(path, mmap_mode="c", allow_pickle=False).view(np.ndarray)
            except (OSError, ValueError) as error:
                raise UnweaveError(f"{path} is damaged ({error}); {REBUILD}") from None
        return self._open[name]

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.npy").is_file()


REBUILD = "build the feature store again (the model and the data it came from are in its manifest)"


# ---- manifest --------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write the manifest with the size and sha256 of every column in the folder."""
    columns = {
        path.stem: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.glob("*.npy"))
    }
    write_json(folder / MANIFEST, {"format": FORMAT, **values, "columns": columns})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole store: format known, every column there with its size.

    Raises:
        UnweaveError: saying which of these failed.
    """
    if not (folder / MANIFEST).is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {MANIFEST}"
        raise UnweaveError(f"no feature store in {folder}: it {what}. Build one with unweave.features.build_features")
    manifest = read_json(folder / MANIFEST)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UnweaveError(f"{folder / MANIFEST} is not of format {FORMAT!r}: found {found!r}")
    missing = {"columns", "counts", "config", "dictionary"} - manifest.keys()
    if missing or not isinstance(manifest["columns"], dict):
        raise UnweaveError(f"{folder / MANIFEST} lacks {sorted(missing) or 'its columns'}; {REBUILD}")
    for name, entry in manifest["columns"].items():
        path = folder / f"{name}.npy"
        try:
            size = path.stat().st_size
        except OSError:
            raise UnweaveError(f"{path} is missing; {REBUILD}") from None
        if size != entry.get("bytes"):
            raise UnweaveError(
                f"{path} is cut short or changed: expected {entry.get('bytes')} bytes, found {size}; {REBUILD}"
            )
    return manifest


def verify_columns(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every column with its sha256.

    Raises:
        UnweaveError: naming the first one that differs.
    """
    for name, entry in manifest["columns"].items():
        path = folder / f"{name}.npy"
        if sha256_file(path) != entry.get("sha256"):
            raise UnweaveError(f"{path} is damaged: its sha256 differs from the manifest; {REBUILD}")


# ---- the folder ------------------------------------------------------------------------------------------------


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``; on success rename it into place, over a store that was there.

    Raises:
        UnweaveError: when ``folder`` holds something that is not a feature store, or cannot be written.
    """
    folder = Path(folder)
    try:
        if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise UnweaveError(f"{folder} is not empty and holds no feature store: choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clean_leftovers(folder)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=folder.parent))
    except OSError as error:
        raise UnweaveError(f"cannot write {folder}: {error.strerror or error}") from None
    try:
        yield building
        os.chmod(building, 0o755)
        _rename_over(building, folder)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, OSError):
            raise UnweaveError(
                f"cannot write {folder}: {error.strerror or error}. Free some space (or choose another folder) and "
                "run the same command again; a store that was there is untouched."
            ) from None
        raise


def _rename_over(building: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(building, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=folder.parent))
    os.replace(folder, old / "old")
    try:
        os.replace(building, folder)
    except OSError:
        os.replace(old / "old", folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _clean_leftovers(folder: Path) -> None:
    """Remove what killed builds of this folder left, if nobody has written there for an hour."""
    for leftover in folder.parent.glob(f".{folder.name}.building-*"):
        times = [p.stat().st_mtime for p in (leftover, *leftover.glob("*.npy")) if p.exists()]
        if times and time.time() - max(times) > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
