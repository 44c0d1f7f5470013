"""``train_many``: a grid of dictionaries on one stream of rows, each as if it were trained alone."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from unweave.activations.ring import ShuffleRing
from unweave.activations.stream import Chunk, RowStream
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import only_writer
from unweave.kernels.joint import JointProduct, JointWorkspace
from unweave.progress import track
from unweave.training._steps import ClosedFormStep
from unweave.training._trainer import Prepared, Trainer
from unweave.training.config import TrainingConfig
from unweave.training.loop import (
    Checkpoints,
    Run,
    Trained,
    checkpoint_file,
    finished,
    identity_of,
    make_ring,
    of_others,
    precision_of,
    private_rng,
    remove_checkpoint,
)

# What all members share, because they see the same batches.
_SHARED = ("n_rows", "batch_size", "seed", "ring_rows", "mixing", "normalise_input", "precision", "checkpoint_every")
_MOST_SCORES = 2**28  # of a joint product: 1 GB of float32, half as much again of int8's sums and scores


def train_many(
    members: Mapping[str, tuple[Dictionary, TrainingConfig]], stream: RowStream, folder: str | Path | None = None
) -> dict[str, Trained]:
    """Train several dictionaries on the same rows in the same order: the rows are made, read and mixed once.

    Every member ends as :func:`~unweave.training.train` would leave it with the same config, up to the last digits of
    float32 sums. Members trained in closed form share one encoder product. Killed and called again, it goes on from
    the last checkpoint.

    Args:
        members: by name (also the names of their folders): a dictionary, trained in place, and its config. Anything
            may differ but what decides the batches: n_rows, batch_size, seed, ring_rows, mixing, normalise_input,
            precision.
        stream: where the rows come from.
        folder: gets one folder per member, as ``train`` writes it, and the checkpoint they share.

    Raises:
        UnweaveError: for no members, names that are no folder names, members on different devices or of different
            widths, configs that ask for different batches, or whatever ``train`` raises.
    """
    folder = None if folder is None else Path(folder)
    config, device = _common(members)
    results: dict[str, Trained] = {}
    with contextlib.ExitStack() as held:
        if folder is not None:
            held.enter_context(only_writer(folder))
            for name, (dictionary, own) in members.items():
                if (folder / name / "training.json").is_file():
                    results[name] = finished(folder / name, dictionary, own, identity_of(dictionary, own, stream.data))
        left = {name: member for name, member in members.items() if name not in results}
        if left:
            held.enter_context(private_rng(device, config.seed))
            held.enter_context(precision_of(config.precision))
            grid = _Grid(left, stream, config, folder, done=results.keys())
            try:
                grid.loop()
            finally:
                grid.close()
            results |= grid.finish()
        if folder is not None:
            remove_checkpoint(folder)
    return {name: results[name] for name in members}


def _common(members: Mapping[str, tuple[Dictionary, TrainingConfig]]) -> tuple[TrainingConfig, torch.device]:
    """A config that speaks for the batches of all, and their device."""
    if not members:
        raise UnweaveError("train_many: expected at least one member, found none")
    for name in members:
        if not name or Path(name).name != name or name in (".", "..", "checkpoints"):
            raise UnweaveError(f"train_many: a member's name is its folder's name; {name!r} cannot be one")
    (first, config), *others = members.values()
    for dictionary, own in others:
        for field in _SHARED:
            if getattr(own, field) != getattr(config, field):
                raise UnweaveError(
                    f"train_many: members see the same batches, so {field} must be equal: found "
                    f"{getattr(config, field)!r} and {getattr(own, field)!r}"
                )
        if dictionary.device != first.device:
            raise UnweaveError(f"train_many: expected one device, found {first.device} and {dictionary.device}")
    if any(own.keep_checkpoint for _, own in members.values()):
        raise UnweaveError("train_many: members share one checkpoint while they train, so keep_checkpoint must be off")
    if len({id(dictionary) for dictionary, _ in members.values()}) < len(members):
        raise UnweaveError("train_many: the same dictionary is two members; build one for each")
    return config, first.device


class _SharedRing:
    """One ring whose batches go to every member before the next one is drawn. To a trainer it looks like its own."""

    def __init__(self, ring: ShuffleRing) -> None:
        self.ring = ring
        self.sample, self.stats = ring.sample, ring.stats
        self._drawn_for: int | None = None
        self._batch: Chunk | None = None
        self._prepared: dict[tuple[float, float | None], Prepared] = {}

    def rows(self, trainer: _MemberTrainer) -> Prepared:
        """The batch of the trainer's step, prepared once for all members with the same scale."""
        if self._batch is None or self._drawn_for != trainer.step:
            self._batch, self._drawn_for = self.ring.draw(), trainer.step
            self._prepared.clear()
        key = (trainer.scale, trainer.target_scale)
        if key not in self._prepared:
            self._prepared[key] = trainer._prepared(self._batch)
        return self._prepared[key]

    def state_dict(self) -> dict[str, Any]:
        return {}  # saved once, by the grid

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _MemberTrainer(Trainer):
    """A trainer with the batches of all and random numbers of its own."""

    def __init__(self, dictionary: Dictionary, shared: _SharedRing, config: TrainingConfig) -> None:
        self.shared: Any = shared
        super().__init__(dictionary, self.shared, config)
        self._rng = torch.get_rng_state()

    def start(self) -> None:
        super().start()
        self._rng = torch.get_rng_state()  # a dictionary may draw some for its starting point

    def _rows(self) -> Prepared:
        return self.shared.rows(self)

    def advance(self) -> None:
        torch.set_rng_state(self._rng)
        super().advance()
        self._rng = torch.get_rng_state()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rng": self._rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._rng = state["rng"]


class _Grid:
    """All members with their files, and the checkpoint they share."""

    def __init__(
        self,
        members: Mapping[str, tuple[Dictionary, TrainingConfig]],
        stream: RowStream,
        config: TrainingConfig,
        folder: Path | None,
        done: Collection[str],
    ) -> None:
        self.config = config
        self.checkpoints = Checkpoints(folder, config.checkpoint_every)
        saved = self.checkpoints.read()
        if saved is not None and saved.get("members", {}).keys() - done != members.keys():
            found = ", ".join(saved.get("members", {})) or "a training of one dictionary"
            raise UnweaveError(
                f"{self.checkpoints.file} belongs to another grid ({found}): name the same members to go on with it, "
                "choose another folder, or delete it to start anew"
            )
        self.ring = make_ring(stream, config, next(iter(members.values()))[0].device)
        if saved is not None:
            self.ring.load_state_dict(saved["ring"])
        shared, seeded = _SharedRing(self.ring), torch.get_rng_state()
        self.runs: dict[str, Run] = {}
        for name, (dictionary, own) in members.items():
            torch.set_rng_state(seeded)  # as if it were alone
            trainer = _MemberTrainer(dictionary, shared, own)
            state = {} if saved is None else saved["members"][name]
            own_folder = None if folder is None else folder / name
            if own_folder is not None and checkpoint_file(own_folder).is_file():
                raise of_others(checkpoint_file(own_folder), "a training of one dictionary")
            self.runs[name] = Run(trainer, own_folder, identity_of(dictionary, own, stream.data), state)
        self._joints = _join([run.trainer for run in self.runs.values()])

    def loop(self) -> None:
        runs, config = self.runs, self.config
        first = next(iter(runs.values())).trainer
        verb = f"train {len(runs)} dictionaries" + (f" (from step {first.step:,})" if first.step else "")
        with track((config.n_steps - first.step) * config.batch_size, verb) as progress:
            while first.step < config.n_steps:
                for joint in self._joints:
                    joint.forget_scores()
                for run in runs.values():
                    run.advance()
                progress.advance(config.batch_size)
                if self.checkpoints.due(first.step):
                    self.save()

    def save(self) -> None:
        """Everything in one file: members that stood at different steps could not go on together."""
        members = {name: run.state() for name, run in self.runs.items()}
        self.checkpoints.write({"ring": self.ring.state_dict(), "members": members})

    def close(self) -> None:
        """Close the logs, and give every encoder memory of its own again."""
        for run in self.runs.values():
            run.log.close()
        for joint in self._joints:
            joint.part()

    def finish(self) -> dict[str, Trained]:
        return {name: run.finish() for name, run in self.runs.items()}


def _join(trainers: list[Trainer]) -> list[JointProduct]:
    """Let members that are trained in closed form by the same plan, from the same rows, share one encoder product.

    The library that multiplies may differ, for it was timed for each member's size; the first member's does it for all.
    """
    groups: dict[Any, list[tuple[Trainer, ClosedFormStep]]] = {}
    for trainer in trainers:
        # A joint product is of rows before any centre is taken off: too long for scores that stay in bfloat16.
        if isinstance(trainer.stepper, ClosedFormStep) and trainer.stepper.plan.scores != "bfloat16":
            plan = trainer.stepper.plan
            key = (plan.backend, plan.scores, trainer.dictionary.d_in, trainer.scale)
            groups.setdefault(key, []).append((trainer, trainer.stepper))
    joints = []
    for together in groups.values():
        for group in _of_bounded_size(together):
            plan = group[0][1].plan
            joint = JointProduct([stepper.parameters["W_enc"] for _, stepper in group], plan)
            for number, (_, stepper) in enumerate(group):
                screen = stepper.work.screen.state_dict()
                stepper.work = JointWorkspace(joint, number)
                stepper.work.screen.load_state_dict(screen)
            joints.append(joint)
    return joints


def _of_bounded_size(
    group: list[tuple[Trainer, ClosedFormStep]],
) -> Iterator[list[tuple[Trainer, ClosedFormStep]]]:
    """Parts of two and more whose scores for a batch fit in memory; who would be alone keeps its own product."""
    part: list[tuple[Trainer, ClosedFormStep]] = []
    n_features = 0
    for member in group:
        trainer = member[0]
        most = _MOST_SCORES // trainer.config.batch_size
        if part and n_features + trainer.dictionary.n_features > most:
            if len(part) > 1:
                yield part
            part, n_features = [], 0
        part.append(member)
        n_features += trainer.dictionary.n_features
    if len(part) > 1:
        yield part
