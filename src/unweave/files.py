"""Writing files so that a reader never sees half of one, and reading them with clear errors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unweave.errors import UnweaveError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it into place.

    A full disk or a crash leaves the old file, if there was one, untouched.

    Raises:
        UnweaveError: when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise UnweaveError(f"cannot write {path}: {error.strerror or error}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # safetensors reports a full disk in an error of its own, so the text is what tells.
        if isinstance(error, OSError) or "No space left" in str(error):
            reason = getattr(error, "strerror", None) or str(error)
            raise UnweaveError(
                f"cannot write {path}: {reason}. Free some space (or choose another folder) and run the same "
                "command again; what was already written is kept."
            ) from None
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened for fsync there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnweaveError(f"no file at {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"{path} is not valid JSON ({error}); it may be cut short or not ours") from None


def write_tensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically. Tensors are made contiguous."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, dict(metadata or {}))


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, Any]:
    """Read all tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise UnweaveError(f"no file at {path}")
    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError) as error:
        raise UnweaveError(f"{path} is not a whole safetensors file ({error}); it is cut short or damaged") from None


def sha256_file(path: str | Path, progress: Callable[[int], None] | None = None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def cache_dir() -> Path:
    """Where downloads and converted models are kept: $UNWEAVE_CACHE, $XDG_CACHE_HOME/unweave or ~/.cache/unweave."""
    if named := os.environ.get("UNWEAVE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unweave"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnweaveError(f"cannot write {folder}: {error.strerror or error}") from None
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two processes in one folder are then the user's to avoid
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnweaveError(
                f"another process is writing into {folder}: wait for it, or choose another folder"
            ) from None
        except OSError:  # some network file systems cannot lock
            pass
        yield
    finally:
        os.close(handle)
