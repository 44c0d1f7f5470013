"""evaluate: one call that measures a dictionary, with intervals and rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.dictionaries._base import Dictionary
from unweave.dictionaries._origin import check_origin
from unweave.errors import UnweaveError
from unweave.evaluation._match import check_model, check_widths
from unweave.evaluation._rows import EvaluationRows, bar
from unweave.evaluation._splices import PartFit, Splice, find_splices, part_columns
from unweave.evaluation.baselines import BASELINES
from unweave.evaluation.bootstrap import Estimate, estimate
from unweave.evaluation.loss import LossSums, measure_loss, measure_splice
from unweave.evaluation.result import Evaluation
from unweave.evaluation.sequences import SequenceSums, row_weights
from unweave.interventions import RowEdit, reconstruct
from unweave.metrics import FiringSums, GroupedSums, Groups, ReconstructionSums
from unweave.sources import part_names

_SCORES = 1 << 26  # (rows, n_features) scores made at a time: 256 MB as float32
_COUNTS = 1 << 25  # (groups, n_features) firing counts kept: 128 MB
_NO_MODELS = "the rows are of several models and do not bring them along: give a JoinedSource of their TextSources"
_BASELINE_METRICS = (
    *("fvu", "cosine", "ce_loss_recovered", "ce_loss_recovered_mean", "kl", "ce_spliced"),
    *("sequence_mse", "special_mse"),
)


def evaluate(
    dictionary: Dictionary,
    source: Any,
    *,
    model: Any = None,
    fit: Any = None,
    n_rows: int = 65_536,
    n_loss_tokens: int = 16_384,
    baselines: bool | Sequence[str] = True,
    n_bootstrap: int = 1000,
    seed: int = 0,
    trained_on: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Measure a dictionary on rows it was not trained on.

    Reconstruction (fvu, cosine, l2_ratio, relative_bias) and firing (l0, dead_share, dense_share) need rows only.
    The loss metrics (ce_*, kl) splice the reconstruction into the language model the rows came from: of a composite
    site at all its parts at once, each made of the untouched model's rows. Rows of several parts have an fvu for each
    (``fvu:layers.6``), since in the common one the longest rule; rows of several models (a JoinedSource) have the loss
    metrics of each model with its own part spliced in (``kl:a``, ``kl:b``). On rows of dialogues, sequence_mse and
    special_mse weigh every dialogue alike, the latter by the template's own tokens alone.

    Args:
        dictionary: put in eval mode for the while.
        source: held-out data: a TextSource, an ActivationStore, an ArraySource (anything with ``batches()``).
            The rows of one evaluation are kept in memory: ``n_rows * (d_in + d_out)`` numbers in the source's dtype.
        model: the LanguageModel for the loss metrics; a TextSource brings its own. With rows from a store, pass it.
        fit: where the mean (for mean ablation) and the baselines are fitted: an ActivationStore or source of training
            rows, or a tensor of target rows. None: the first rows of ``source``, which are then not evaluated.
            ``max(8192, 10 * d_out)`` rows are used; of a short ``source`` what ``n_rows`` leaves, at least a third.
        n_rows: rows evaluated, in whole contexts; all there are if fewer.
        n_loss_tokens: predicted tokens the loss is measured on (rounded up to whole batches); 0 leaves it out.
        baselines: True for all in :data:`unweave.evaluation.BASELINES`, or their names, or False. Each reconstructs
            the target rows from themselves with as many numbers a row as the dictionary's mean L0, rounded (at
            least 1). For a transcoder, which has to predict its target from another site, they are therefore a
            generous rival.
        n_bootstrap: resamples of documents for the 95 % intervals; 0 for none.
        seed: of the resamples and the random dictionary.
        trained_on: the provenance of the dictionary's training rows; None for what is known of one that was loaded.
            Another model or site is refused, and so is one that the dictionary is not known to be for.
        force: go on all the same.
        progress: show a bar.

    Raises:
        UnweaveError: for a wrong width, another model or site, no rows, NaN rows or NaN reconstructions.
    """
    provenance = getattr(source, "provenance", None) or {}
    site, target_site = provenance.get("site"), provenance.get("target_site") or provenance.get("site")
    check_widths(dictionary, source.d_in, source.d_out or source.d_in, site)
    model = model if model is not None else getattr(source, "model", None)
    has_model = any(hasattr(getattr(one, "model", model), "site") for one in getattr(source, "joined", [source]))
    wanted = n_loss_tokens > 0 and site is not None and has_model
    several = "parts" in provenance or "target_parts" in provenance
    splices = find_splices(model, source, provenance) if wanted and several else []
    has_loss = wanted and (bool(splices) or not several)
    if not force:
        check_origin(dictionary.trained_on if trained_on is None else trained_on, provenance, "evaluated on")
        if has_loss:
            check_model(model, provenance)
    rivals = [] if baselines is False else list(BASELINES) if baselines is True else list(baselines)
    if unknown := [name for name in rivals if name not in BASELINES]:
        raise UnweaveError(f"no baseline {unknown[0]!r}; there are {', '.join(BASELINES)}")

    was_training = dictionary.training
    dictionary.eval()
    try:
        with torch.no_grad():
            rows = EvaluationRows.read(source, fit, n_rows, needs_fit=bool(rivals) or has_loss, progress=progress)
            groups = Groups(min(1024, max(32, _COUNTS // dictionary.n_features)))
            marks = provenance.get("chat")
            parts = part_columns(provenance)
            found: list[GroupedSums] = _measure_dictionary(dictionary, rows, groups, marks, parts, progress)
            l0 = max(1, round(float(found[1].values()["l0"])))
            fitted = {
                name: BASELINES[name](rows.fit, l0=l0, n_features=dictionary.n_features, seed=seed) for name in rivals
            }
            compared = {
                name: _measure_baseline(fn, dictionary, rows, groups, marks, parts) for name, fn in fitted.items()
            }
            loss = None
            for where in splices:
                rivalling = {name: (_in_chunks(fn, dictionary), True) for name, fn in fitted.items()}
                made = {"spliced": (_in_chunks(reconstruct(dictionary), dictionary), False), **rivalling}
                loss = _measure_splice(where, rows, made, n_loss_tokens, groups, progress)
                found.append(loss.of("spliced", where.label))
                for name in fitted:
                    compared[name].append(loss.of(name, where.label))
            if has_loss and not splices:
                edits: dict[str, tuple[RowEdit, str]] = {
                    "spliced": (_in_chunks(reconstruct(dictionary), dictionary), str(site))
                }
                edits |= {name: (_in_chunks(fn, dictionary), str(target_site)) for name, fn in fitted.items()}
                loss = _measure_loss(model, rows, str(target_site), edits, n_loss_tokens, groups, progress)
                found.append(loss.of("spliced"))
                for name in fitted:
                    compared[name].append(loss.of(name))
            return Evaluation(
                _estimates(found, n_bootstrap, seed),
                {name: _estimates(sums, n_bootstrap, seed, _BASELINE_METRICS) for name, sums in compared.items()},
                _data(provenance, rows, loss, l0 if rivals else None, n_bootstrap, seed)
                | ({"loss_left_out": _NO_MODELS} if wanted and not has_loss else {})
                | ({"note": dictionary.inference_note} if dictionary.inference_note else {}),
            )
    finally:
        dictionary.train(was_training)


def _chunks(
    batches: Sequence[ActivationBatch], dictionary: Dictionary, marks: Mapping[str, Any] | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``(input, target, document, weights)``, few enough rows at a time that their dense scores fit.

    The weights are those of :func:`unweave.evaluation.sequences.row_weights`, where the rows are of dialogues.
    """
    step = _chunk_rows(dictionary)
    for batch in batches:
        weights = row_weights(batch, marks) if marks else torch.zeros(batch.n_rows, 2)
        parts = (batch.input, batch.target, batch.meta.document, weights)
        for i in range(0, batch.n_rows, step):
            x, target, document, weight = (part[i : i + step] for part in parts)
            yield x, target, document, weight


def _chunk_rows(dictionary: Dictionary) -> int:
    return min(4096, max(64, _SCORES // dictionary.n_features))


def _wide(rows: Tensor) -> Tensor:
    """At least float32: a 16-bit mean would be a poor rival."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _in_chunks(fn: RowEdit, dictionary: Dictionary) -> RowEdit:
    """``fn`` on a bounded number of rows at a time."""
    step = _chunk_rows(dictionary)
    return lambda rows: torch.cat([fn(_wide(part)) for part in rows.split(step)])


def _measure_dictionary(
    dictionary: Dictionary,
    rows: EvaluationRows,
    groups: Groups,
    marks: Mapping[str, Any] | None,
    parts: Mapping[str, slice],
    progress: bool,
) -> list[GroupedSums]:
    reconstruction = ReconstructionSums(dictionary.d_out, groups)
    each = [PartFit(label, columns, groups) for label, columns in parts.items()]
    firing = FiringSums(dictionary.n_features, groups)
    sequences = SequenceSums(dictionary.d_out, groups)
    with bar(rows.n_rows, "evaluate: reconstruct", "rows", progress) as advance:
        for x, target, document, weights in _chunks(rows.batches, dictionary, marks):
            x = dictionary.check_input(x)
            code = dictionary.encode(x)
            x_hat = dictionary.reconstruct(x, code)
            if not bool(torch.isfinite(x_hat).all()):
                raise UnweaveError(
                    "evaluate: the dictionary makes NaN or infinity of finite rows: its weights are broken"
                )
            if not bool(torch.isfinite(target).all()):
                raise UnweaveError(
                    "evaluate: the target rows hold NaN or infinity. Drop them, or check the model's dtype"
                )
            firing.add(code, document)
            target = target.to(x_hat.device)
            for sums in (reconstruction, *each):
                sums.add(target, x_hat, document)
            if marks:
                sequences.add(target, x_hat, weights, document)
            advance(len(x))
    return [reconstruction, firing, *each, *([sequences] if marks else [])]


def _measure_baseline(
    fn: Callable[[Tensor], Tensor],
    dictionary: Dictionary,
    rows: EvaluationRows,
    groups: Groups,
    marks: Mapping[str, Any] | None,
    parts: Mapping[str, slice],
) -> list[GroupedSums]:
    each = [PartFit(label, columns, groups) for label, columns in parts.items()]
    sums, sequences = ReconstructionSums(dictionary.d_out, groups), SequenceSums(dictionary.d_out, groups)
    for _, target, document, weights in _chunks(rows.batches, dictionary, marks):
        target = _wide(target).to(dictionary.device)
        made = fn(target)
        for one in (sums, *each):
            one.add(target, made, document)
        if marks:
            sequences.add(target, made, weights, document)
    return [sums, *each, *([sequences] if marks else [])]


def _measure_loss(
    model: Any,
    rows: EvaluationRows,
    target_site: str,
    edits: Mapping[str, tuple[RowEdit, str]],
    n_tokens: int,
    groups: Groups,
    progress: bool,
) -> LossSums:
    mean = rows.fit.mean(0, dtype=torch.float64)
    available = min(n_tokens, rows.n_rows)
    with bar(available, "evaluate: splice into the model", "tokens", progress) as advance:
        return measure_loss(
            model, rows.batches, target_site, edits, mean, n_tokens=n_tokens, groups=groups, advance=advance
        )


def _measure_splice(
    where: Splice,
    rows: EvaluationRows,
    variants: Mapping[str, tuple[RowEdit, bool]],
    n_tokens: int,
    groups: Groups,
    progress: bool,
) -> LossSums:
    mean = rows.fit.mean(0, dtype=torch.float64)
    into = f"evaluate: splice into {where.label or 'the model'}"
    with bar(min(n_tokens, rows.n_rows), into, "tokens", progress) as advance:
        return measure_splice(where, rows.batches, variants, mean, n_tokens=n_tokens, groups=groups, advance=advance)


def _estimates(
    parts: Sequence[GroupedSums], n_bootstrap: int, seed: int, only: Sequence[str] | None = None
) -> dict[str, Estimate]:
    found: dict[str, Estimate] = {}
    for sums in parts:
        found |= estimate(sums, n_bootstrap, seed)
    return found if only is None else {name: one for name, one in found.items() if name.partition(":")[0] in only}


def _data(
    provenance: Mapping[str, Any],
    rows: EvaluationRows,
    loss: LossSums | None,
    baseline_l0: int | None,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    described = provenance.get("data")
    split = provenance.get("split") or (described.get("split") if isinstance(described, Mapping) else None)
    return {
        "split": split,
        "n_tokens": sum(batch.items.n_tokens for batch in rows.batches),
        "n_documents": len(torch.cat([batch.meta.document for batch in rows.batches]).unique()),
        "n_rows": rows.n_rows,
        "n_loss_tokens": loss.n_targets if loss else 0,
        "fit_rows": len(rows.fit),
        "fit_from": rows.fit_from,
        "parts": part_names(provenance),
        "baseline_l0": baseline_l0,
        "n_bootstrap": n_bootstrap,
        "seed": seed,
        "source": dict(provenance),
    }
