"""``train``: the loop around :class:`~unweave.training._trainer.Trainer`, with log, checkpoints and resume."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unweave.activations.half_ring import HalfRing
from unweave.activations.ring import ShuffleRing
from unweave.activations.stream import RowStream
from unweave.dictionaries import Dictionary
from unweave.dictionaries._base import no_side
from unweave.errors import UnweaveError
from unweave.files import only_writer, read_json, write_json
from unweave.progress import track
from unweave.training._trainer import Trainer
from unweave.training.checkpoint import read_checkpoint, write_checkpoint
from unweave.training.config import TrainingConfig
from unweave.training.health import health as health_of
from unweave.training.metrics_log import MetricsLog, read_metrics
from unweave.training.trackers import Tracker, make_trackers, running

_FORMAT = "unweave.training/1"
CHECKPOINT_SECONDS = 60.0
CHECKPOINT_SHARE = 0.05  # of the time, at most, goes into writing checkpoints


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        dictionary: trained, in eval mode, for raw activations (the input scale is folded in).
        metrics: the lines of ``metrics.jsonl``.
        health: plain sentences about what looks wrong; empty when nothing does.
        config: how it was trained.
        scale: what the rows were multiplied with during training; ``target_scale`` likewise, None without a target.
        folder: where it was saved, if anywhere.
    """

    dictionary: Dictionary
    metrics: list[dict[str, Any]] = field(repr=False)
    health: list[str]
    config: TrainingConfig
    scale: float
    target_scale: float | None = None
    folder: Path | None = None

    def __repr__(self) -> str:
        last = self.metrics[-1] if self.metrics else {}
        shown = ", ".join(
            f"{name} {last[name]:.4g}" for name in ("fvu", "l0", "dead_share") if last.get(name) is not None
        )
        return f"Trained({self.dictionary.name}, {self.config.n_steps:,} steps, {shown})"


def train(
    dictionary: Dictionary,
    stream: RowStream,
    config: TrainingConfig,
    folder: str | Path | None = None,
    *,
    trackers: Iterable[str | Tracker] | str | Tracker = (),
) -> Trained:
    """Train a dictionary on a stream of rows.

    With a folder, training survives being killed: called again with the same config it goes on from the last
    checkpoint, and on a CPU ends with the very weights it would have had. A finished training is read back at once.

    Args:
        dictionary: trained in place, on the device it is on.
        stream: where the rows come from.
        folder: gets ``metrics.jsonl``, ``checkpoints/latest.safetensors`` while training, and at the end
            ``dictionary/`` and ``training.json``. None keeps everything in memory.
        trackers: "wandb", "tensorboard" or objects like :class:`~unweave.training.trackers.Tracker`.

    Raises:
        UnweaveError: when the folder holds a training of another config, the rows do not fit the dictionary, the
            loss is no longer finite, or the disk is full. The last checkpoint is kept in every case.
    """
    return run_in_folder(
        lambda: Trainer(dictionary, make_ring(stream, config, dictionary.device), config),
        dictionary,
        config,
        identity_of(dictionary, config, stream.data),
        folder,
        trackers,
    )


def run_in_folder(
    make: Callable[[], Trainer],
    dictionary: Dictionary,
    config: TrainingConfig,
    identity: dict[str, Any],
    folder: str | Path | None,
    trackers: Iterable[str | Tracker] | str | Tracker,
) -> Trained:
    """Train with the trainer that ``make`` makes, or go on, or read back what is finished; see :func:`train`."""
    folder = None if folder is None else Path(folder)
    trackers = make_trackers(trackers)
    with contextlib.ExitStack() as held:
        if folder is not None:
            held.enter_context(only_writer(folder))
            if (folder / "training.json").is_file():
                return finished(folder, dictionary, config, identity)
        held.enter_context(private_rng(dictionary.device, config.seed))
        held.enter_context(precision_of(config.precision))
        run = Run(make(), folder, identity)
        try:
            with running(trackers, run.id, {**config.to_dict(), **identity["dictionary"]}, folder):
                run.loop(trackers)
        finally:
            run.log.close()
        return run.finish()


def identity_of(dictionary: Dictionary, config: TrainingConfig, data: Any) -> dict[str, Any]:
    """What makes two trainings the same one; ``data`` is the source or store of the rows."""
    return {
        "config": config.to_dict(),
        "dictionary": {"arch": dictionary.name, **dictionary.config.to_dict()},
        "data": json.loads(json.dumps(data.provenance)),  # as it will be read back
    }


def make_ring(stream: RowStream, config: TrainingConfig, device: torch.device) -> ShuffleRing:
    capacity = max(config.ring_rows, config.batch_size)
    kind = ShuffleRing if config.mixing == "rows" else HalfRing
    return kind(stream, config.batch_size, capacity, config.seed, device=device)


class Checkpoints:
    """The checkpoint in a folder, and when the next one is due: every so many steps, or about once a minute of work."""

    def __init__(self, folder: Path | None, every: int | None) -> None:
        self.file = None if folder is None else checkpoint_file(folder)
        self._every, self._wait, self._written = every, CHECKPOINT_SECONDS, time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """What the last one holds; None where there is none."""
        return read_checkpoint(self.file) if self.file is not None and self.file.is_file() else None

    def due(self, step: int) -> bool:
        if self.file is None or self._every == 0:
            return False
        if self._every is None:
            return time.monotonic() - self._written >= self._wait
        return step % self._every == 0

    def write(self, state: dict[str, Any]) -> None:
        assert self.file is not None
        started = time.monotonic()
        write_checkpoint(self.file, state)
        self._written = time.monotonic()
        self._wait = max(CHECKPOINT_SECONDS, (self._written - started) / CHECKPOINT_SHARE)


class Run:
    """A trainer with its files: log, checkpoint, the finished dictionary.

    ``saved``: the state to go on from; None looks for a checkpoint in the folder, and an empty one starts anew.
    """

    def __init__(
        self, trainer: Trainer, folder: Path | None, identity: dict[str, Any], saved: dict[str, Any] | None = None
    ) -> None:
        self.trainer, self.folder, self.identity = trainer, folder, identity
        self.config = trainer.config
        needed, found = trainer.dictionary.needs_side, identity["data"].get("side")
        if needed and found and found != needed:
            raise no_side(trainer.dictionary, found)
        self.checkpoints = Checkpoints(folder, self.config.checkpoint_every)
        log_file = None if folder is None else folder / "metrics.jsonl"
        if saved is None and (saved := self.checkpoints.read()) is not None and "identity" not in saved:
            raise of_others(self.checkpoints.file, "a grid of dictionaries (a sweep)")
        if saved:
            _refuse_other(self.identity, saved["identity"], folder, f"step {saved['trainer']['step']:,}")
            trainer.load_state_dict(saved["trainer"])
            self.id: str = saved["run_id"]
            self.log = MetricsLog(log_file, saved["log_cursor"])
        else:
            trainer.start()
            self.id = uuid.uuid4().hex[:12]
            self.log = MetricsLog(log_file)
        self._clock, self._counted = time.monotonic(), trainer.step

    def loop(self, trackers: list[Tracker]) -> None:
        trainer, config = self.trainer, self.config
        verb = f"train (from step {trainer.step:,})" if trainer.step else "train"
        with track((config.n_steps - trainer.step) * config.batch_size, verb) as progress:
            while trainer.step < config.n_steps:
                line = self.advance()
                progress.advance(config.batch_size)
                if line is not None:
                    for tracker in trackers:
                        tracker.log(line, trainer.step)
                    progress.note(_note(line))
                if self.checkpoints.due(trainer.step):
                    self.checkpoints.write(self.state())
        if config.keep_checkpoint and self.folder is not None:
            self.checkpoints.write(self.state())

    def advance(self) -> dict[str, Any] | None:
        """One step; the line of the log that it completes, if it does."""
        trainer = self.trainer
        ends = trainer.window.ends_after(trainer.step)
        trainer.advance()
        if not ends:
            return None
        line, now = trainer.line(), time.monotonic()
        rows_per_s = (trainer.step - self._counted) * self.config.batch_size / max(now - self._clock, 1e-9)
        self._clock, self._counted = now, trainer.step
        self.log.append(line | {"rows_per_s": round(rows_per_s, 1), **trainer.ring.stats()})
        return self.log.lines[-1]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "identity": self.identity,
            "run_id": self.id,
            "log_cursor": self.log.cursor(),
            "trainer": self.trainer.state_dict(),
        }

    def finish(self) -> Trained:
        """Fold, save the dictionary, then say so in ``training.json``: until that is there, training is not done."""
        trainer, config = self.trainer, self.config
        trainer.finish()
        sentences = health_of(self.log.lines, config, trainer.dictionary.config, input_norms=trainer.input_norms)
        result = Trained(
            trainer.dictionary, self.log.lines, sentences, config, trainer.scale, trainer.target_scale, self.folder
        )
        if self.folder is not None:
            trainer.dictionary.save(self.folder / "dictionary")
            summary = {
                "format": _FORMAT,
                **self.identity,
                "run_id": self.id,
                "engine": trainer.stepper.engine,
                "steps": trainer.step,
                "scale": trainer.scale,
                "target_scale": trainer.target_scale,
                "input_norms": trainer.input_norms,
                "health": sentences,
            }
            write_json(self.folder / "training.json", summary)
            if not config.keep_checkpoint:
                remove_checkpoint(self.folder)
        return result


def finished(folder: Path, dictionary: Dictionary, config: TrainingConfig, identity: dict[str, Any]) -> Trained:
    """The result of a training that ended before, with its weights put into ``dictionary``."""
    summary = read_json(folder / "training.json")
    if not isinstance(summary, dict) or summary.get("format") != _FORMAT:
        raise UnweaveError(f"{folder / 'training.json'} is not of format {_FORMAT!r}")
    _refuse_other(identity, summary, folder, "finished")
    saved = Dictionary.load(folder / "dictionary")
    dictionary.load_state_dict(saved.state_dict())
    if not config.keep_checkpoint:
        remove_checkpoint(folder)
    return Trained(
        dictionary.eval(),
        read_metrics(folder / "metrics.jsonl"),
        summary["health"],
        config,
        summary["scale"],
        summary["target_scale"],
        folder,
    )


def _refuse_other(ours: dict[str, Any], theirs: dict[str, Any], where: Path | None, state: str) -> None:
    """Raise unless both describe the same training.

    A setting that an older unweave did not have yet stands at its default there; one that there no longer is counts as
    different.
    """
    harmless = TrainingConfig.HARMLESS
    fields = TrainingConfig.model_fields.items()
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}
    if isinstance(theirs.get("config"), dict):
        theirs = {**theirs, "config": {**defaults, **theirs["config"]}}
    found = []
    for part in ("config", "dictionary", "data"):
        mine, other = ours[part], theirs.get(part)
        if not isinstance(mine, dict) or not isinstance(other, dict):
            mine, other = {part: mine}, {part: other}
        for name in sorted(mine.keys() | other.keys()):
            if mine.get(name) != other.get(name) and not (part == "config" and name in harmless):
                found.append(f"{name}: there {other.get(name)!r}, now {mine.get(name)!r}")
    if found:
        raise UnweaveError(
            f"{where} ({state}) belongs to another training: {'; '.join(found)}. Use the old values to go on with "
            "it, choose another folder, or delete it to start anew."
        )


def checkpoint_file(folder: Path) -> Path:
    return folder / "checkpoints" / "latest.safetensors"


def of_others(checkpoint: Path | None, whose: str) -> UnweaveError:
    return UnweaveError(
        f"{checkpoint} belongs to {whose}: go on with that, choose another folder, or delete it to start anew"
    )


def remove_checkpoint(folder: Path) -> None:
    checkpoint = checkpoint_file(folder)
    checkpoint.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file is in there: leave the folder
        checkpoint.parent.rmdir()


def _note(line: dict[str, Any]) -> str:
    fvu = "-" if line["fvu"] is None else f"{line['fvu']:.3f}"  # one row has no variance
    return f"loss {line['loss']:.4g}  fvu {fvu}  l0 {line['l0']:.1f}  dead {line['dead_share']:.1%}"


@contextlib.contextmanager
def private_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch for the training alone; the caller's random state is as before afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def precision_of(precision: str) -> Iterator[None]:
    """Allow TF32 matrix products on NVIDIA cards for the training alone."""
    matmul: Any = torch.backends.cuda.matmul
    name, wanted = ("fp32_precision", {"tf32": "tf32", "float32": "ieee"}[precision])
    if not hasattr(matmul, name):  # before torch 2.9
        name, wanted = "allow_tf32", precision == "tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, wanted)
    try:
        yield
    finally:
        setattr(matmul, name, before)
