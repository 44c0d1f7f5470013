"""Which container a file is, by its first bytes and never by its name."""

from __future__ import annotations

from pathlib import Path

from unweave.errors import UnweaveError
from unweave.formats.containers._info import Tensors
from unweave.formats.containers.archive import is_archive, members
from unweave.formats.containers.headed import open_headed
from unweave.formats.containers.npz import open_npz
from unweave.formats.containers.pickled import open_pickled
from unweave.formats.containers.safetensors import open_safetensors


def open_tensors(path: str | Path) -> Tensors:
    """The tensors of a safetensors, npz or torch file, none of them read yet (but for those after a line of JSON).

    Raises:
        UnweaveError: when it is none of these, or damaged, or dangerous.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UnweaveError(f"cannot read {path}: {error.strerror or error}") from None
    if is_archive(path):
        names = [m.filename for m in members(path)]
        if any(name.rpartition("/")[2] == "data.pkl" for name in names):
            return open_pickled(path)
        if names and all(name.endswith(".npy") for name in names):
            return open_npz(path)
        raise UnweaveError(f"{path} is a zip archive without tensors of its own: it holds {', '.join(names[:4])}, ...")
    if is_headed(start):
        return open_headed(path)
    if is_safetensors(start, path):
        return open_safetensors(path)
    return open_pickled(path)  # says what is wrong with it


def is_headed(start: bytes) -> bool:
    """By the first nine bytes: words of JSON, and no length of a header."""
    return start[:1] == b"{" and int.from_bytes(start[:8], "little") >= 1 << 48


def is_safetensors(start: bytes, path: Path) -> bool:
    """By the first nine bytes of a file that is no archive."""
    return start[8:] == b"{" or path.suffix == ".safetensors"
