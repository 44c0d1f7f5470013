"""Checkpoints on the Hugging Face hub: headers and settings by range requests, whole files when values are read."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from torch import Tensor

from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._ranges import Fetch, RangeFile
from unweave.formats.containers import (
    MAX_SETTINGS,
    SMALL,
    Settings,
    Tensors,
    is_headed,
    is_safe_name,
    open_tensors,
    read_headers,
    read_settings,
)

_ID = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w.%-]+))?((?:/[\w.=+:-]+)*)/?")
_MAX_FILES = 10_000
_MAX_BYTES = 1 << 28  # of all headers and settings that are looked at
_TIMEOUT = 30  # seconds for an answer to begin, and between its pieces


class HubName(NamedTuple):
    """``owner/repository[@revision][/folder/or/file]``; a revision is a branch, tag or commit, with ``%2F`` for /."""

    repository: str
    revision: str | None
    inside: str


def looks_like_hub_id(name: str) -> bool:
    """Whether a name may be one of the hub's (nothing local has it)."""
    leads_out = any(part in (".", "..") for part in name.split("/"))
    return bool(_ID.fullmatch(name)) and not (leads_out or name.startswith(("/", ".", "~")))


def parse(name: str) -> HubName:
    match = _ID.fullmatch(name)
    if match is None or not looks_like_hub_id(name):
        raise UnweaveError(f"expected a path or owner/repository[@revision][/folder], found {name!r}")
    return HubName(match[1], unquote(match[2]) if match[2] else None, match[3].strip("/"))


@contextmanager
def on_hub(name: str) -> Iterator[Checkpoint]:
    """The folder or file of a hub name. The user's token is used where there is one, as huggingface_hub does.

    The files of its folder lie in a temporary one, empty; what is asked of them is fetched into it.

    Raises:
        UnweaveError: when huggingface_hub is missing, or the hub has no such thing, or cannot be reached.
    """
    where = parse(name)
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UnweaveError(
            f"no file or folder at {name}; to take it from the Hugging Face hub, pip install huggingface_hub"
        ) from None
    try:
        api = HfApi()
        info = api.model_info(where.repository, revision=where.revision, timeout=_TIMEOUT)
    except Exception as error:  # the hub's errors come from several packages
        cached = None if _refused(error) else _cached(where)
        if cached is None:
            raise UnweaveError(
                f"no file or folder at {name}, and the hub does not give it either: {reason(error)}"
            ) from None
        yield Checkpoint(cached, f"{where.repository}/{where.inside}")
        return
    with tempfile.TemporaryDirectory(prefix="unweave-") as place:
        root = Path(place)
        _lay_out(root, where, [file.rfilename for file in info.siblings or ()])
        path = root / where.inside
        if not path.exists():
            raise UnweaveError(f"the repository {where.repository} has no {where.inside!r}{_in(where.revision)}")
        card = info.card_data or {}
        known = {"revision": info.sha, "license": card.get("license"), "base model": card.get("base_model")}
        with _HubFiles(api, root, where, str(info.sha)) as files:
            try:
                yield Checkpoint(path, f"{where.repository}/{where.inside}".rstrip("/"), files, known)
            except UnweaveError as error:
                raise UnweaveError(str(error).replace(str(root), where.repository)) from None


class _HubFiles:
    """The files of a repository: what of them is read is fetched when it is."""

    remote = True

    def __init__(self, api: Any, root: Path, where: HubName, commit: str) -> None:
        self._api, self._root, self._where, self._commit = api, root, where, commit
        self._open: dict[Path, RangeFile] = {}
        self._failed: dict[Path, UnweaveError] = {}
        self._settings: list[Path] = []
        self._fetched = 0

    def __enter__(self) -> _HubFiles:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            file.close()

    def settings(self, path: Path) -> Settings:
        file = self._ranges(path)
        if file.size <= MAX_SETTINGS:  # else the reader refuses it
            file.seek(0)
            file.read()
            self._settings.append(path)
        return read_settings(path)

    def tensors(self, path: Path) -> Tensors:
        file = self._ranges(path)
        file.seek(0)
        if is_headed(file.read(9)):  # no part of such a file says what is in it
            return open_tensors(self.whole(path))
        file.seek(0)
        read_headers(file, path)  # pyright: ignore[reportArgumentType]
        return _FetchedTensors(open_tensors(path), lambda: self.whole(path))

    def whole(self, path: Path) -> Path:
        """The file downloaded into the hub's cache, with the settings read so far: it can be read again offline."""
        for settings in self._settings:
            self._download(settings)
        return self._download(path)

    def _ranges(self, path: Path) -> RangeFile:
        if path in self._failed:  # several formats look at a file; the hub is asked once
            raise self._failed[path]
        if path not in self._open:
            try:
                self._open[path] = RangeFile(path, self._fetch_from(path.relative_to(self._root).as_posix()))
            except UnweaveError as error:
                self._failed[path] = error
                raise
        return self._open[path]

    def _fetch_from(self, name: str) -> Fetch:
        from huggingface_hub import hf_hub_url

        url, called = (
            hf_hub_url(self._where.repository, name, revision=self._commit),
            f"{self._where.repository}/{name}",
        )

        def fetch(start: int, stop: int) -> tuple[bytes, int]:
            self._fetched += stop - start
            if self._fetched > _MAX_BYTES:
                raise UnweaveError(f"{called}: more than {_MAX_BYTES:,} bytes of headers; download it to look at it")
            try:
                return _get(url, start, stop, called)
            except UnweaveError:
                raise
            except Exception as error:
                raise UnweaveError(f"cannot read {called} from the hub: {reason(error)}") from None

        return fetch

    def _download(self, path: Path) -> Path:
        name = path.relative_to(self._root).as_posix()
        try:
            # By the name of the revision, so that the cache knows it by that name.
            found = Path(self._api.hf_hub_download(self._where.repository, name, revision=self._where.revision))
        except Exception as error:
            raise UnweaveError(f"cannot download {path}: {reason(error)}") from None
        if self._commit not in found.parts:
            raise UnweaveError(f"{path} was changed on the hub while it was being read: try again")
        return found


class _FetchedTensors(Tensors):
    """Known by a file's header; the first value that did not come with it has the whole file downloaded."""

    def __init__(self, header: Tensors, download: Callable[[], Path]) -> None:
        super().__init__(header.path, header.info, header.values_beside, header.metadata)
        self._header, self._download = header, download

    @cached_property
    def _whole(self) -> Tensors:
        found = open_tensors(self._download())
        if found.info != self.info:
            raise UnweaveError(f"{self.path}: what was downloaded is not what its header said; try again")
        return found

    def stored_bytes(self, name: str) -> int:
        return self._header.stored_bytes(name)

    def _raw(self, name: str) -> Tensor:
        return (self._header if self.stored_bytes(name) <= SMALL else self._whole)._raw(name)


def reason(error: Exception) -> str:
    """What the hub said, in one line with what to do about it."""
    from huggingface_hub import errors

    said = " ".join(str(error).split())
    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its terms on its page, then log in with `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: then log in with `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return "it does not know who asks: log in with `hf auth login` (or set HF_TOKEN)"
    return said[:200].rstrip(". ") or type(error).__name__


def _refused(error: Exception) -> bool:
    """Whether the hub was reached and has no such thing: then what an older cache holds is not it."""
    from huggingface_hub import errors

    return isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError))


def _cached(where: HubName) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(where.repository, revision=where.revision, local_files_only=True)
    except Exception as error:
        folder = getattr(error, "snapshot_path", None)  # of a snapshot that lacks files
    path = Path(folder, where.inside) if folder else None
    return path if path and path.exists() else None


def _in(revision: str | None) -> str:
    return f" at revision {revision!r}" if revision else ""


def _lay_out(root: Path, where: HubName, names: list[str]) -> None:
    """Empty files of the names below what was asked for, and beside it; without those that lead out of the folder."""
    above = where.inside.rpartition("/")[0]
    inside = where.inside if above else f"{where.inside}/"  # what lies beside a top-level folder is others'
    wanted = [
        name
        for name in names
        if is_safe_name(name)
        and (name.startswith(f"{above}/") if above else "/" not in name or not where.inside or name.startswith(inside))
    ]
    if len(wanted) > _MAX_FILES:
        raise UnweaveError(
            f"{where.repository}/{above} holds {len(wanted):,} files, expected at most {_MAX_FILES:,}: name a folder "
            "in it"
        )
    try:
        for name in wanted:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
    except OSError as error:
        raise UnweaveError(f"the files of {where.repository} cannot lie in one folder here: {error}") from None


# ---- push -----------------------------------------------------------------------------------------------------------


def check_place(repository: str, folder: str = "") -> None:
    """Refuse what is no ``owner/name``, or no folder in it."""
    where = parse(f"{repository}/{folder}".rstrip("/"))
    if where.repository != repository:
        raise UnweaveError(f"expected owner/name and a folder such as layers.12/topk, found {repository!r}, {folder!r}")


def upload(folder: str | Path, repository: str, inside: str = "", *, private: bool = False, force: bool = False) -> str:
    """Put the files of a folder into a repository of models, made if need be, as one commit.

    Args:
        inside: the folder in the repository. private: make it a private one. force: go on where files are already.

    Returns:
        The address of what was pushed.

    Raises:
        UnweaveError: when files lie there, a repository that should be private is public, or the hub refuses.
    """
    check_place(repository, inside)
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UnweaveError("to push to the Hugging Face hub, pip install huggingface_hub") from None
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        info = api.model_info(repository, timeout=_TIMEOUT)
        if private and not info.private:
            raise UnweaveError(f"{repository} is there already and public: choose another name, or leave private out")
        names = [file.rfilename for file in info.siblings or ()]
        there = [name for name in names if name != ".gitattributes" and (not inside or name.startswith(f"{inside}/"))]
        if there and not force:
            shown = ", ".join(there[:4]) + (", ..." if len(there) > 4 else "")
            raise UnweaveError(
                f"{repository} holds {len(there):,} files where these would go ({shown}): choose another folder "
                "(--folder), or force it (--force), which writes over files of the same name and leaves the others"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            path_in_repo=inside or None,
            commit_message=f"Add {inside or 'a dictionary'} with unweave",
            parent_commit=info.sha,  # what others push in the meantime is not written over
        )
    except UnweaveError:
        raise
    except Exception as error:
        raise UnweaveError(f"cannot push to {repository}: {reason(error)}") from None
    return f"{api.endpoint}/{repository}" + (f"/tree/main/{inside}" if inside else "")


# ---- parts of files -------------------------------------------------------------------------------------------------


def _get(url: str, start: int, stop: int, called: str) -> tuple[bytes, int]:
    """The bytes from ``start`` to ``stop`` of a file, fewer where it ends before, and its size."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with _stream(url, {**build_hf_headers(), **asked}) as response:
        said = response.headers.get("Content-Range", "")
        if response.status_code == 416 and said.strip() == "bytes */0":
            return b"", 0
        hf_raise_for_status(response)
        if response.status_code == 206:
            match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", said.strip())
            first, last, size = (int(match[i]) for i in (1, 2, 3)) if match else (-1, -1, -1)
            if match is None or (first, last + 1) != (start, min(stop, size)):
                raise UnweaveError(f"{called}: asked the hub for bytes {start} to {stop - 1}, it gave {said[:80]!r}")
            data = _read(response, last + 1 - first)
            if len(data) != last + 1 - first:
                raise UnweaveError(
                    f"{called}: expected an answer of {last + 1 - first:,} bytes from the hub, found {len(data):,} or "
                    "more; try again"
                )
            return data, size
        # No ranges: a small file may come whole.
        data = _read(response, MAX_SETTINGS)
        if len(data) > MAX_SETTINGS or start != 0:
            raise UnweaveError(
                f"{called}: the hub (or a proxy before it) gives whole files only, and this is a large one. Download "
                "it (`hf download`) and name the local file"
            )
        return data, len(data)


def _read(response: Any, most: int) -> bytes:
    """A body, no further than just beyond ``most`` bytes."""
    data = bytearray()
    for piece in response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(1 << 16):
        data += piece
        if len(data) > most:
            break
    return bytes(data)


def _stream(url: str, headers: dict[str, str]) -> Any:
    """A response whose body is not read yet. Before its version 1 huggingface_hub spoke through requests."""
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    if callable(getattr(session, "stream", None)):
        return session.stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True)
    return session.get(url, headers=headers, timeout=_TIMEOUT, stream=True)
