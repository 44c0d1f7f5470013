"""What a reconstruction costs the model: next-token loss and KL with it spliced in.

``ce_loss_recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean)``: 1 where the model does not notice, 0 where the
site might as well be zeroed. Zeroing is a weak rival (it breaks more than it removes), so the same ratio with mean
ablation, ``ce_loss_recovered_mean``, stands beside it. All variants are spliced at the same positions: those that
gave rows in the source (not BOS, not padding, not the high-norm rows it dropped). What counts as a prediction is
defined in :class:`unweave.sources.Contexts`.

SAEBench and SAELens call the same ratio ``ce_loss_score``; their KL score is a ratio, ours is in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.evaluation._forward import LOGIT_BYTES, Edit, Forward, ReplayForward, RowsForward, WholeForward
from unweave.evaluation._splices import Splice
from unweave.interventions import RowEdit, ablate_mean, ablate_zero
from unweave.metrics import GroupedSums, Groups
from unweave.sources import Contexts
from unweave.sources.sites import Site


class LossSums:
    """Sums of loss and KL by variant and by group of documents."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.n = torch.zeros(groups.max_groups, dtype=torch.float64)
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.n_targets = 0

    def add(self, variant: str, kind: str, values: Tensor, group: Tensor) -> None:
        total = self.sums.setdefault((variant, kind), torch.zeros_like(self.n))
        total.index_add_(0, group, values.double().cpu())

    def count(self, group: Tensor) -> None:
        self.n.index_add_(0, group, torch.ones(len(group), dtype=torch.float64))
        self.n_targets += len(group)

    def of(self, variant: str, label: str = "") -> VariantLoss:
        """The statistics of one variant, anchored at the clean, zeroed and mean-ablated model."""
        return VariantLoss(self, variant, label)


class VariantLoss(GroupedSums):
    """ce_loss_recovered, ce_loss_recovered_mean, kl and the four losses of one variant.

    ``label`` goes behind their names, with a colon, where there are those of several models.
    """

    def __init__(self, sums: LossSums, variant: str, label: str = "") -> None:
        super().__init__(sums.groups)
        self.sums, self.variant, self.label = sums, variant, label

    def counts(self) -> np.ndarray:
        return self.sums.n.numpy()

    def statistics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        n = weights @ self.counts()

        def mean(variant: str, kind: str) -> np.ndarray:
            return (weights @ self.sums.sums[variant, kind].numpy()) / n

        clean, zero, average = (mean(v, "ce") for v in ("clean", "zero", "mean"))
        spliced = mean(self.variant, "ce")
        found = {
            "ce_loss_recovered": _recovered(zero, spliced, clean),
            "ce_loss_recovered_mean": _recovered(average, spliced, clean),
            "kl": mean(self.variant, "kl"),
            "ce_clean": clean,
            "ce_spliced": spliced,
            "ce_zero": zero,
            "ce_mean": average,
        }
        return {f"{name}:{self.label}" if self.label else name: value for name, value in found.items()}


def _recovered(floor: np.ndarray, spliced: np.ndarray, clean: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return (floor - spliced) / np.where(floor == clean, np.nan, floor - clean)


@torch.no_grad()
def measure_loss(
    model: Any,
    batches: Iterable[ActivationBatch],
    site: str,
    variants: Mapping[str, tuple[RowEdit, str]],
    mean: Tensor,
    *,
    n_tokens: int,
    groups: Groups,
    advance: Callable[[int], None] = lambda n: None,
) -> LossSums:
    """Loss and KL of every variant over at least ``n_tokens`` predicted tokens (or all there are).

    Args:
        model: a LanguageModel.
        site: where to splice.
        variants: name to (row edit, name of the site whose rows the edit is given).
        mean: ``(d_out,)``, for the mean-ablated anchor.
        advance: told the number of tokens done after each batch.

    The anchors "zero" and "mean" are measured besides the variants. The clean loss comes from the same code path as
    the others, so an edit that changes nothing gives KL 0 and recovers exactly 1. Losses are worked out in float32,
    whatever the model's dtype, from logits made at most ~50 MB at a time.
    """
    target = model.site(site)
    edits: dict[str, Edit] = {name: (edit, model.site(read)) for name, (edit, read) in variants.items()}
    # One Site object per name: a splice that reads where it writes must see that it does.
    edits = {name: (edit, target if read.name == target.name else read) for name, (edit, read) in edits.items()}
    edits |= {"zero": (ablate_zero, target), "mean": (ablate_mean(mean), target)}
    sums = LossSums(groups)
    forward: Forward | None = None
    for batch in batches:
        contexts = Contexts.of(batch, model.special_ids).to(model.device)
        if forward is None:
            forward = _forward(model, target, [read for _, read in edits.values()], contexts)
        for part in forward.split(contexts):
            _measure(forward, part, edits, sums)
        advance(contexts.n_targets)
        if sums.n_targets >= n_tokens:
            break
    return sums


def measure_splice(
    where: Splice,
    batches: Iterable[ActivationBatch],
    variants: Mapping[str, tuple[RowEdit, bool]],
    mean: Tensor,
    *,
    n_tokens: int,
    groups: Groups,
    advance: Callable[[int], None] = lambda n: None,
) -> LossSums:
    """The same for rows of several parts, all put back at once; see :class:`~unweave.evaluation._splices.Splice`.

    What is put back is made of the rows in the batches, which are those of the untouched model.

    Args:
        variants: name to (row edit of whole rows, whether it is given the target rows instead of the input).
        mean: ``(d_out,)``, of whole target rows.
    """
    model, sums, forward = where.model, LossSums(groups), RowsForward(where.model, where.site)
    variants = {**variants, "zero": (ablate_zero, True), "mean": (ablate_mean(mean), True)}
    for batch in batches:
        contexts = Contexts.of(batch, model.special_ids).to(model.device)
        first = 0
        for part in forward.split(contexts):
            rows = slice(first, first + int(part.spliced.sum()))
            first = rows.stop
            given = {name: (batch.target if target else batch.input)[rows] for name, (_, target) in variants.items()}
            edits: dict[str, Any] = {name: (where.own(fn), given[name]) for name, (fn, _) in variants.items()}
            _measure(forward, part, edits, sums)
        advance(contexts.n_targets)
        if sums.n_targets >= n_tokens:
            break
    return sums


def _forward(model: Any, target: Site, reads: list[Site], contexts: Contexts) -> Forward:
    read = next((site for site in reads if site is not target), target)
    replay = ReplayForward.build(model.model, target, read, contexts)
    return replay or WholeForward(model.model, target, model.model.config.get_text_config().vocab_size)


def _measure(forward: Forward, contexts: Contexts, edits: Mapping[str, Edit], sums: LossSums) -> None:
    if contexts.n_targets == 0:
        return
    targets = contexts.targets
    group = sums.groups(contexts.target_document)
    sums.count(group)
    clean = forward.clean(contexts)
    states = {name: forward.spliced(contexts, edit) for name, edit in edits.items()}
    step = max(1, LOGIT_BYTES // (4 * forward.logits(clean[:1]).shape[1]))
    for i in range(0, len(targets), step):
        at = slice(i, i + step)
        logits = forward.logits(clean[at]).float()
        total = logits.logsumexp(1)
        p = (logits - total[:, None]).exp_()
        sums.add("clean", "ce", _cross_entropy(logits, total, targets[at]), group[at])
        for name, state in states.items():
            changed = forward.logits(state[at]).float()
            changed_total = changed.logsumexp(1)
            sums.add(name, "ce", _cross_entropy(changed, changed_total, targets[at]), group[at])
            # KL = sum p (log p - log q), with the two normalisers taken out of the sum. A token the model forbids
            # (logit -inf) has p = 0 and adds nothing.
            difference = torch.where(p > 0, logits - changed, 0.0)
            sums.add(name, "kl", torch.linalg.vecdot(p, difference) - (total - changed_total), group[at])


def _cross_entropy(logits: Tensor, total: Tensor, targets: Tensor) -> Tensor:
    return total - logits.gather(1, targets[:, None]).squeeze(1)
