"""Checkpoints on the Hugging Face hub: fetched into its cache, then read like any other folder."""

from __future__ import annotations

import re
from pathlib import Path

from unweave.errors import UnweaveError

_ID = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)((?:/[\w.=+:-]+)*)/?")


def looks_like_hub_id(name: str) -> bool:
    """Whether a name may be ``owner/repository`` or ``owner/repository/folder/or/file`` (nothing local has it)."""
    return bool(_ID.fullmatch(name)) and not name.startswith(("/", ".", "~"))


def fetch(name: str) -> Path:
    """The folder or file of a hub id, downloaded if it is not in the cache.

    Raises:
        UnweaveError: when huggingface_hub is missing, or the hub has no such thing, or cannot be reached.
    """
    match = _ID.fullmatch(name)
    if match is None:
        raise UnweaveError(f"expected a path or owner/repository[/folder], found {name!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnweaveError(
            f"no file or folder at {name}; to take it from the Hugging Face hub, pip install huggingface_hub"
        ) from None
    repository, inside = match[1], match[2].strip("/")
    patterns = [inside, f"{inside}/*"] if inside else None
    if patterns and inside.endswith((".pt", ".pth", ".safetensors")):  # a file: its settings lie beside it
        beside = inside.rpartition("/")[0]
        patterns += [f"{beside}/{kind}".lstrip("/") for kind in ("*.json", "*.yaml")]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub's errors come from several packages
        reason = " ".join(str(error).split())[:200]
        raise UnweaveError(f"no file or folder at {name}, and the hub does not give it either: {reason}") from None
    path = folder / inside
    if not path.exists():
        raise UnweaveError(f"the repository {repository} has no {inside!r}")
    return path
