"""The files of a repository on the Hugging Face hub."""

from __future__ import annotations

from unweave.errors import UnweaveError


class NotListed(UnweaveError):
    """The hub answers, but not with the files of this repository."""


def list_files(repository: str) -> tuple[str, list[str]]:
    """The revision and the files of a repository's default branch.

    Raises:
        NotListed: when the hub refuses it: it is gone, gated or private.
        UnweaveError: when huggingface_hub is missing, or the hub cannot be reached.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UnweaveError("to list what is on the Hugging Face hub, pip install huggingface_hub") from None
    hub = HfApi()
    try:
        revision = hub.repo_info(repository, timeout=30).sha
        return str(revision), hub.list_repo_files(repository, revision=revision)
    except HfHubHTTPError as error:
        raise NotListed(f"{repository}: {_short(error)}") from None
    except Exception as error:  # no network, offline mode, no such host: these come from several packages
        raise UnweaveError(
            f"the hub cannot be reached ({_short(error)}): try again with a network; "
            "what was listed before is kept, and in use"
        ) from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
