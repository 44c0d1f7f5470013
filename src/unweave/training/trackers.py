"""Experiment trackers: what they are, and adapters for Weights & Biases and TensorBoard (imported when used)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from unweave.errors import UnweaveError, near_names


@runtime_checkable
class Tracker(Protocol):
    """Anything that wants the metrics as they come. Errors it raises stop the training."""

    def start(self, run_id: str, config: dict[str, Any], folder: Path | None) -> None:
        """Called once before the first step; a resumed run comes with the ``run_id`` it had."""
        ...

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Called with every line of ``metrics.jsonl``."""
        ...

    def finish(self) -> None:
        """Called at the end, also after an error."""
        ...


class Wandb:
    """Weights & Biases. A resumed training continues the same wandb run.

    Args:
        options: passed to ``wandb.init`` (project, name, tags, mode, ...).
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._run: Any = None

    def start(self, run_id: str, config: dict[str, Any], folder: Path | None) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        options = {"project": "unweave", "id": run_id, "resume": "allow", **self.options}
        if folder is not None:
            options.setdefault("dir", str(folder))
        self._run = wandb.init(config=config, **options)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._run.log({key: value for key, value in metrics.items() if value is not None}, step=step)

    def finish(self) -> None:
        if self._run is not None:
            self._run.finish()


class TensorBoard:
    """TensorBoard event files.

    Args:
        log_dir: where to write; ``tensorboard/`` in the training folder when None.
    """

    def __init__(self, log_dir: str | Path | None = None) -> None:
        self.log_dir = log_dir
        self._writer: Any = None

    def start(self, run_id: str, config: dict[str, Any], folder: Path | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        if self.log_dir is None and folder is None:
            raise UnweaveError(
                "the tensorboard tracker needs a place: give train a folder, or TensorBoard(log_dir=...)"
            )
        self._writer = SummaryWriter(str(self.log_dir or Path(folder or ".") / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for key, value in metrics.items():
            if key not in ("step", "rows") and isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()


_KNOWN = {"wandb": Wandb, "tensorboard": TensorBoard}


def make_trackers(trackers: Iterable[str | Tracker] | str | Tracker) -> list[Tracker]:
    """Trackers from names and objects.

    Raises:
        UnweaveError: for a name that is not known or an object that is no tracker.
    """
    if isinstance(trackers, str | Tracker):
        trackers = [trackers]
    made: list[Tracker] = []
    for tracker in trackers:
        if isinstance(tracker, str):
            if tracker not in _KNOWN:
                raise UnweaveError(f"no tracker {tracker!r}: {near_names(tracker, _KNOWN)}")
            made.append(_KNOWN[tracker]())
        elif isinstance(tracker, Tracker):
            made.append(tracker)
        else:
            raise UnweaveError(f"expected a tracker with start, log and finish, found {type(tracker).__name__}")
    return made


@contextlib.contextmanager
def running(trackers: list[Tracker], run_id: str, config: dict[str, Any], folder: Path | None) -> Iterator[None]:
    """Trackers started at the beginning and finished at the end, whatever happens between."""
    with contextlib.ExitStack() as stack:
        for tracker in trackers:
            stack.callback(tracker.finish)
            tracker.start(run_id, config, folder)
        yield


def _missing(package: str) -> UnweaveError:
    return UnweaveError(f"the {package} tracker needs the {package} package: pip install 'unweave[track]'")
