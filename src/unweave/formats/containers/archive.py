"""Zip archives: their directory read with suspicion, their files unpacked into a folder and nowhere else."""

from __future__ import annotations

import shutil
import stat
import zipfile
from io import BytesIO
from pathlib import Path, PurePosixPath

from unweave.errors import UnweaveError

ARCHIVE = b"PK\x03\x04"
_MAX_MEMBERS = 100_000
_MAX_RATIO = 200  # weights hardly compress; a thousandfold is what a bomb does
_HARMLESS = 1 << 20  # small files may be as empty as they like


def is_archive(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == ARCHIVE
    except OSError:
        return False


def members(path: Path, stored: bool = False, data: BytesIO | None = None) -> list[zipfile.ZipInfo]:
    """The files in an archive.

    Args:
        stored: whether every file has to be uncompressed, as torch writes them. data: the archive, where it is not the
            whole file.

    Raises:
        UnweaveError: for a damaged directory, a name that leads out of the folder, a name twice, links, encryption,
            files that overlap or grow beyond reason when unpacked.
    """
    try:
        with zipfile.ZipFile(path if data is None else data) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise UnweaveError(f"{path} is not a whole zip archive ({error}); fetch it again") from None
    if len(found) > _MAX_MEMBERS:
        raise _refuse(path, f"it holds {len(found):,} files, expected at most {_MAX_MEMBERS:,}")
    seen: set[str] = set()
    for info in found:
        _check_name(path, info.filename)
        if info.filename in seen:
            raise _refuse(path, f"{info.filename[:80]!r} is in it twice")
        seen.add(info.filename)
        mode = info.external_attr >> 16
        if info.flag_bits & 1 or (mode and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) and stat.S_IFMT(mode)):
            raise _refuse(path, f"{info.filename[:80]!r} is encrypted, a link or a device")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or (stored and info.compress_type):
            raise _refuse(path, f"{info.filename[:80]!r} is compressed in a way that nobody writes weights")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise _refuse(
                path, f"{info.filename[:80]!r} claims {info.file_size:,} bytes but has {info.compress_size:,}"
            )
        if info.file_size > _HARMLESS and info.file_size > _MAX_RATIO * max(1, info.compress_size):
            raise _refuse(path, f"{info.filename[:80]!r} would grow from {info.compress_size:,} to {info.file_size:,}")
    end = 0
    for info in sorted(found, key=lambda i: i.header_offset):
        if info.header_offset < end:
            raise _refuse(path, f"{info.filename[:80]!r} overlaps another file")
        end = info.header_offset + info.compress_size
    if end > (path.stat().st_size if data is None else data.getbuffer().nbytes):
        raise _refuse(path, "it is cut short")
    return found


def unpack(path: Path, folder: Path, inside: str = "") -> None:
    """Write the files below ``inside`` (all of them when empty) into a folder."""
    wanted = [i for i in members(path) if not i.is_dir() and (i.filename == inside or i.filename.startswith(inside))]
    need, free = sum(i.file_size for i in wanted), shutil.disk_usage(folder).free
    if need > free:
        raise UnweaveError(f"{path}: unpacking needs {need:,} bytes, the disk of {folder} has {free:,} free")
    try:
        with zipfile.ZipFile(path) as archive:
            for info in wanted:
                target = folder / PurePosixPath(info.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, zipfile.zlib.error) as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise UnweaveError(f"{path} is not a whole zip archive ({error}); fetch it again") from None


def is_safe_name(name: str) -> bool:
    """Whether the name of a file that somebody else chose stays in the folder it is put in."""
    parts = PurePosixPath(name).parts
    odd = any(ord(c) < 32 for c in name) or "\\" in name or ":" in name
    return bool(name) and not (name.startswith("/") or ".." in parts or odd or len(name) > 400)


def _check_name(path: Path, name: str) -> None:
    if not is_safe_name(name):
        raise _refuse(path, f"the name {name[:80]!r} leads out of the folder it would be unpacked in, or is no name")


def _refuse(path: Path, why: str) -> UnweaveError:
    return UnweaveError(f"{path}: refused, {why}. Do not trust this file; get it from where it was published")
