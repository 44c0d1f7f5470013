"""One end-to-end run in memory: contexts in order, the model with the dictionary in it, and the step that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from unweave.activations.stream import Chunk
from unweave.batch import ActivationBatch
from unweave.dictionaries import Dictionary, TrainingBatch
from unweave.errors import UnweaveError
from unweave.interventions import splice
from unweave.sources import Contexts, LanguageModel, TextSource
from unweave.sources.sites import Site, find_blocks
from unweave.training._steps import Diverged
from unweave.training._trainer import Trainer
from unweave.training.config import TrainingConfig

_LOGIT_BYTES = 2**28  # a few tensors of this size exist at once


class EndToEndConfig(TrainingConfig):
    """How to train a dictionary by what it does to the model it is spliced into.

    The loss is ``kl KL(model || spliced) + ce CE(spliced) + downstream E + local ||y - y_hat||^2`` plus the
    dictionary's own penalties (an L1 or L0 term, AuxK), with targets scaled to E||y||^2 = 1 as everywhere.
    ``batch_size`` counts rows, in whole contexts: a step takes as many contexts as give at least so many. Braun et al.
    use ``kl = 1`` alone with an L1 of 1.5 / d on raw codes, which is ``l1_coefficient = 1.5 rms / d`` for ``relu``
    with rms the root mean square norm of the rows; or ``kl = 0.5`` with a downstream term.

    Attributes:
        kl_coefficient: of the divergence between the model's next-token distributions, averaged over the tokens the
            evaluation counts: every real, non-special token with one before it.
        ce_coefficient: of the spliced model's cross-entropy on the text itself, over the same tokens. It rewards
            whatever predicts the text, also where the model would not; KL asks for the model's own predictions.
        downstream_coefficient: of the squared differences at later sites, each relative to the mean square norm of
            the clean rows there (of the contexts that go through the model together), averaged over the spliced
            positions and over sites. Braun et al. weigh mean squares per dimension by 2.5; relative to E||x||^2 = 1
            that depends on the model, so the size is ours to choose.
        downstream_sites: which; every block's output behind the dictionary when empty.
        local_coefficient: of the squared error of the reconstruction itself.
    """

    by_reconstruction: ClassVar[bool] = False

    kl_coefficient: NonNegativeFloat = 1.0
    ce_coefficient: NonNegativeFloat = 0.0
    downstream_coefficient: NonNegativeFloat = 0.0
    downstream_sites: tuple[str, ...] = ()
    local_coefficient: NonNegativeFloat = 0.0


class ContextStream:
    """The contexts of a source in its order, again and again, some whole ones at a time; its state is three numbers."""

    def __init__(self, source: TextSource, batch_size: int) -> None:
        self.data, self.batch_size = source, batch_size
        self._goto(0, 0, 0)

    def _goto(self, epoch: int, piece: int, item: int) -> None:
        """Stand at context ``item`` of batch number ``piece`` of the source."""
        self.epoch, self._piece, self._item = epoch, piece, item
        self._batches: Iterator[ActivationBatch] | None = None
        self._batch: ActivationBatch | None = None

    def next(self) -> ActivationBatch:
        """Whole contexts that together have at least ``batch_size`` rows."""
        parts: list[ActivationBatch] = []
        missing, empty_epochs = self.batch_size, 0
        while missing > 0:
            batch = self._current()
            if batch is None:
                empty_epochs = 0 if parts else empty_epochs + 1
                if empty_epochs > 1:
                    raise _no_rows()
                self._goto(self.epoch + 1, 0, 0)
                continue
            before = torch.searchsorted(batch.row_token, batch.items.offsets)  # rows in front of each context's end
            wanted = int(before[self._item]) + missing
            stop = min(int(torch.searchsorted(before, wanted)), len(batch.items))
            part = batch.of_items(self._item, stop)
            missing -= part.n_rows
            parts.extend([part] if part.n_rows else [])
            self._item = stop
            if stop == len(batch.items):
                self._piece, self._item, self._batch = self._piece + 1, 0, None
        return ActivationBatch.concatenate(parts)

    def _current(self) -> ActivationBatch | None:
        if self._batch is None:
            if self._batches is None:
                self._batches = self.data.batches(skip=self._piece)
            self._batch = next(self._batches, None)
        return self._batch

    def sample(self, n: int) -> Chunk:
        """About ``n`` rows from the beginning, for what depends on data."""
        taken: list[ActivationBatch] = []
        for batch in self.data.batches():
            taken.append(batch)
            if sum(b.n_rows for b in taken) >= n:
                break
        if not any(batch.n_rows for batch in taken):
            raise _no_rows()
        return _rows(ActivationBatch.concatenate(taken))

    def stats(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "piece": self._piece, "item": self._item, "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._goto(state["epoch"], state["piece"], state["item"])


class EndToEndTrainer(Trainer):
    """Steps a dictionary by the gradient that reaches its reconstruction through the model.

    The model is run with the reconstruction ``y_hat`` in its place, which gives ``g = dL / dy_hat``. A dictionary can
    learn from squared errors, and ``||t - y_hat||^2`` averaged over n rows has exactly this gradient for the target
    ``t = y_hat - n g / 2``. So its own ``loss`` (or closed form), penalties, AuxK and straight-through estimators serve
    here as they are, and nothing but the dictionary can move. Where a loss is more than one squared error (nested
    prefixes, an error divided by its variance), all of it pulls towards t.
    """

    ring: Any
    config: Any

    def __init__(self, dictionary: Dictionary, stream: ContextStream, model: LanguageModel, config: EndToEndConfig):
        super().__init__(dictionary, stream, config)  # pyright: ignore[reportArgumentType]
        self.model = model
        self.site = cast(Site, stream.data.target_site)  # check_end_to_end has seen to it
        self.later = later_sites(model, self.site, config)

    def advance(self) -> None:
        batch: ActivationBatch = self.ring.next()
        x, target, side = self._prepared(_rows(batch))
        lr, n = self.lr * self.config.lr_factor(self.step), len(x)
        chance = _random_state(self.device)
        with torch.no_grad():
            made = self.dictionary.reconstruct(x, self.dictionary.encode(x))
        measured, grad = self._through_the_model(batch, made, target)
        _set_random_state(chance, self.device)  # the loss encodes again, and should meet the same chance
        aim = made - n / 2 * grad
        try:
            dead = self.silent > self.config.dead_rows
            loss, values = self.stepper.run(TrainingBatch(x, aim, dead, self.progress, side), lr, self.progress)
        except Diverged as error:
            raise self._diverged({**error.values, **measured}, lr) from None
        values |= measured  # also the mse, which was the distance to the aim
        counts = self._count(loss, values)
        self.silent += n
        self.silent.masked_fill_(counts > 0, 0)
        self.window.add(values)
        if self.window.wants_rows(self.step):
            self.window.add_rows(target, made)
        self.step += 1

    def _through_the_model(
        self, batch: ActivationBatch, made: Tensor, target: Tensor
    ) -> tuple[dict[str, float], Tensor]:
        """The numbers for the log, and the gradient of the loss by the reconstruction ``(n, d_out)``."""
        contexts = Contexts.of(batch, self.model.special_ids).to(self.model.device)
        n_rows, n_targets = len(made), max(1, contexts.n_targets)
        ends = torch.cat([torch.zeros(1, dtype=torch.long), contexts.spliced.sum(1).cumsum(0).cpu()])
        logits = 4 * self.model.n_vocabulary * contexts.tokens.shape[1]  # bytes of those of one context
        step = max(1, _LOGIT_BYTES // logits)
        sums: dict[str, float] = {}
        grads: list[Tensor] = []
        for i in range(0, len(contexts), step):  # a few contexts at a time: logits are wide
            part = contexts[i : i + step]
            rows = slice(int(ends[i]), int(ends[min(i + step, len(contexts))]))
            share = {"tokens": part.n_targets / n_targets, "rows": (rows.stop - rows.start) / n_rows}
            numbers, grad = self._of_some(part, made[rows], target[rows], share)
            grads.append(grad)
            sums = {name: sums.get(name, 0.0) + value for name, value in numbers.items()}
        if not math.isfinite(sums["loss"]):
            raise self._diverged(sums, self.lr)
        return sums, torch.cat(grads)

    def _of_some(
        self, contexts: Contexts, made: Tensor, target: Tensor, share: dict[str, float]
    ) -> tuple[dict[str, float], Tensor]:
        """The same of some contexts; ``share`` is their part in the means."""
        config, model = self.config, self.model
        weights = {"kl": config.kl_coefficient, "ce": config.ce_coefficient, "mse": config.local_coefficient}
        weights["downstream"] = config.downstream_coefficient
        clean, clean_rows = None, {}
        if weights["kl"] or self.later:
            with torch.no_grad(), _Watch(self.later) as clean_rows:
                clean = self._logits(contexts)
        y = made.detach().requires_grad_()
        with torch.enable_grad():
            raw = y / (self.target_scale or self.scale)
            with _Watch(self.later) as rows, splice(model, self.site, lambda _: raw, contexts.spliced):
                logits = self._logits(contexts)
            numbers: dict[str, Tensor] = {}
            if weights["kl"] and clean is not None:
                numbers["kl"] = divergence(clean, logits) * share["tokens"]
            if weights["ce"]:
                ce = F.cross_entropy(logits, contexts.targets, reduction="sum") / max(1, len(logits))
                numbers["ce"] = ce * share["tokens"]
            if self.later and len(y):
                numbers["downstream"] = _apart(rows, clean_rows, contexts.spliced) * share["rows"]
            numbers["mse"] = (target - y).square().sum(1).sum() * (share["rows"] / max(1, len(y)))
            numbers["loss"] = torch.stack([weights[name] * value.to(y.device) for name, value in numbers.items()]).sum()
            (grad,) = torch.autograd.grad(numbers["loss"], y)
        return {name: float(value.detach()) for name, value in numbers.items()}, grad

    def _logits(self, contexts: Contexts) -> Tensor:
        """``(n_targets, vocabulary)``, float32."""
        inputs = {"input_ids": contexts.tokens, "attention_mask": contexts.real.long(), "use_cache": False}
        return self.model.model(**inputs).logits[contexts.predicts].float()


def _apart(rows: dict[str, Tensor], clean: dict[str, Tensor], positions: Tensor) -> Tensor:
    """Squared differences relative to the mean square norm of the clean rows, averaged over positions and sites."""
    shares = []
    for name, changed in rows.items():
        before = clean[name][positions].float()
        gap = (changed[positions].float() - before).square().sum(1).mean()
        shares.append(gap / before.square().sum(1).mean().clamp_min(1e-12))
    return torch.stack(shares).mean()


class _Watch:
    """A context in which the activations at some sites are written down, by name."""

    def __init__(self, sites: list[Site]) -> None:
        self._sites, self._stack = sites, ExitStack()

    def __enter__(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site in self._sites:
            self._stack.enter_context(site.hook(lambda rows, name=site.name: found.update({name: rows})))
        return found

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def divergence(clean: Tensor, changed: Tensor) -> Tensor:
    """``KL(clean || changed)`` of next-token distributions, from logits ``(n, vocabulary)``, averaged over n."""
    p, q = clean.log_softmax(1), changed.log_softmax(1)
    # A token the model forbids (logit -inf) has p = 0 and adds nothing.
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum() / max(1, len(clean))


def later_sites(model: LanguageModel, site: Site, config: EndToEndConfig) -> list[Site]:
    """Where the spliced model is compared with the clean one; none where that has no weight."""
    if config.downstream_coefficient == 0:
        return []
    if config.downstream_sites:
        return [model.site(name) for name in config.downstream_sites]
    blocks = find_blocks(model.model)[1]
    own = next((n for n, block in enumerate(blocks) if any(m is site.module for m in block.modules())), None)
    if own is None:
        raise UnweaveError(f"{site.name!r} lies in no block: name the downstream_sites")
    found = [model.site(f"layers.{n}") for n in range(own, len(blocks)) if f"layers.{n}" != site.name]
    if not found:
        raise UnweaveError(f"no block comes behind {site.name!r}: set downstream_coefficient to 0")
    return found


def _no_rows() -> UnweaveError:
    return UnweaveError("the source gave no rows: is its data empty, or was every row filtered out?")


def _rows(batch: ActivationBatch) -> Chunk:
    """A batch as what a ring hands out."""
    return Chunk(batch.input, batch.target, batch.meta.document, batch.side)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
