"""A health report: what went wrong in a training, in plain sentences with the likely cause, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from unweave.training.config import TrainingConfig

_DEAD_SHARE = 0.2
_L0_TOLERANCE = 0.25
_RATIO_OF_LONG_ROWS = 20.0  # attention sinks and BOS tokens reach 100 and more; ordinary rows stay below 5
_SAME_DOCUMENT_RATE = 0.05  # where the data cannot say what to expect: a batch is worth 20 documents or fewer
_FEW_STEPS = 200
_ROWS_PER_FEATURE = 100


def health(
    metrics: Sequence[Mapping[str, Any]],
    config: TrainingConfig,
    dictionary_config: Any = None,
    *,
    input_norms: Mapping[str, float] | None = None,
) -> list[str]:
    """Sentences about what looks wrong; an empty list means that nothing does.

    Args:
        metrics: lines of ``metrics.jsonl``, in order.
        dictionary_config: read for the number of active features aimed at (``k`` or ``target_l0``) and
            ``n_features``, where it has them.
        input_norms: root mean square ("rms"), "median" and "largest" norm of sampled rows.
    """
    if not metrics:
        return []
    last = metrics[-1]
    found = [
        _length(config, dictionary_config),
        _inputs(config, input_norms or {}),
        _fit(metrics, config),
        _l0(last, dictionary_config),
        _dead(last, config, dictionary_config),
        _correlation(metrics, config),
    ]
    return [sentence for sentence in found if sentence]


def _length(config: TrainingConfig, dictionary_config: Any) -> str | None:
    if config.warmup_steps >= config.n_steps / 2:
        return (
            f"The learning rate was still warming up for {config.warmup_steps:,} of {config.n_steps:,} steps: train "
            "on more rows (n_rows) or lower warmup."
        )
    if config.n_steps < _FEW_STEPS:
        return (
            f"Training took only {config.n_steps:,} steps, too few for most dictionaries to settle: raise n_rows, or "
            f"lower batch_size (now {config.batch_size:,})."
        )
    return None


def _inputs(config: TrainingConfig, norms: Mapping[str, float]) -> str | None:
    rms, median, largest = (norms.get(name, math.nan) for name in ("rms", "median", "largest"))
    if largest > _RATIO_OF_LONG_ROWS * median:
        return (
            f"Some rows are far longer than the rest (largest norm {largest:.3g}, median {median:.3g}) and rule the "
            "loss: drop BOS and other special tokens or set the source's high-norm filter (max_norm_ratio)."
        )
    if not config.normalise_input and not 0.1 <= rms <= 10:
        return (
            f"The rows have a root mean square norm of {rms:.3g} and normalise_input is off: default learning rates "
            "and penalties are meant for 1. Turn normalise_input on."
        )
    return None


def _fit(metrics: Sequence[Mapping[str, Any]], config: TrainingConfig) -> str | None:
    lines = [line for line in metrics if line.get("fvu") is not None]
    curve = [line["fvu"] for line in lines]
    if not curve:
        return "The rows do not vary at all (no variance to explain): check the site and the data."
    if not config.by_reconstruction:
        return None
    last, best = curve[-1], min(curve)
    if last >= 1:
        return (
            f"The dictionary explains nothing (FVU {last:.3g}, the mean alone scores 1): the learning rate may be far "
            f"off (last peak {max(line['lr'] for line in metrics):.2g}), the sparsity penalty too strong, or the "
            "training too short."
        )
    before, now = (line.get("l0") or 0 for line in (lines[curve.index(best)], lines[-1]))
    if last > 1.25 * best + 0.02 and not now < 0.8 * before:  # fewer features cost accuracy: a penalty took hold
        return (
            f"FVU rose from {best:.3g} to {last:.3g} during training: the learning rate is probably too high, or the "
            "data changed on the way (raise ring_rows, or shuffle the documents)."
        )
    return None


def _l0(last: Mapping[str, Any], dictionary_config: Any) -> str | None:
    name = next((n for n in ("k", "target_l0") if getattr(dictionary_config, n, None)), None)
    found = last.get("l0")
    if found is None:
        return None
    if found == 0:
        return "No feature fires at all: the sparsity penalty or the thresholds are too high."
    if name is None:
        return None
    aim = float(getattr(dictionary_config, name))
    if found < (1 - _L0_TOLERANCE) * aim:
        return (
            f"Rows use {found:.1f} features on average, fewer than the {name} = {aim:g} asked for: {name} is larger "
            "than these rows need, or too many features are dead."
        )
    if found > (1 + _L0_TOLERANCE) * aim:
        return (
            f"Rows use {found:.1f} features on average, more than the {name} = {aim:g} asked for: the sparsity "
            "penalty had not won yet. Train longer, or raise it."
        )
    return None


def _dead(last: Mapping[str, Any], config: TrainingConfig, dictionary_config: Any) -> str | None:
    share = last.get("dead_share") or 0.0
    if share <= _DEAD_SHARE:
        return None
    n_features = getattr(dictionary_config, "n_features", None)
    if n_features and config.n_rows < _ROWS_PER_FEATURE * n_features:
        why = f"{config.n_rows:,} rows are few for {n_features:,} features: train longer or use fewer features"
    else:
        why = "use fewer features, a longer warmup, a lower learning rate, or allow more features per row"
    return f"{share:.0%} of the features are dead (silent for more than {config.dead_rows:,} rows): {why}."


def _correlation(metrics: Sequence[Mapping[str, Any]], config: TrainingConfig) -> str | None:
    pairs = [
        (line["same_document_rate"], line.get("expected_same_document_rate"))
        for line in metrics
        if line.get("same_document_rate") is not None
    ]
    if not pairs:
        return None
    rate = sum(measured for measured, _ in pairs) / len(pairs)
    expected = pairs[-1][1]
    if rate <= (_SAME_DOCUMENT_RATE if expected is None else 3 * expected + 0.01):
        return None
    rival = "" if expected is None else f", where shuffled rows would have {expected:.1%}"
    return (
        f"Batches are correlated: {rate:.1%} of the row pairs in a batch come from the same document{rival}. Raise "
        f"ring_rows (now {config.ring_rows:,})."
    )
