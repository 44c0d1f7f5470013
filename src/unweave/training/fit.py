"""``unweave.fit``: from rows in memory, an iterator, a store or a source to a trained dictionary, in one call."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from unweave import dictionaries
from unweave.activations.stream import RowStream
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError, near_names
from unweave.training._rows import Rows, rows_of
from unweave.training.config import TrainingConfig
from unweave.training.loop import Trained, train
from unweave.training.trackers import Tracker

_MIN_STEPS = 1500  # what small data need to settle, whatever their number of rows ...
_MAX_PASSES = 300  # ... but a handful of rows has nothing more to tell
# Derived, arguments of their own, or of no use to a new dictionary.
_RESERVED = frozenset({"d_in", "d_out", "n_features", "n_rows", "seed", "continued"})


def fit(
    data: Any,
    arch: str = "batch_topk",
    *,
    n_features: int | None = None,
    expansion: int = 8,
    k: int | None = None,
    target: Any = None,
    side: Any = None,
    n_rows: int | None = None,
    epochs: float | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    trackers: Iterable[str | Tracker] | str | Tracker = (),
    **options: Any,
) -> Dictionary:
    """Train a dictionary on whatever rows you have.

    >>> dictionary = unweave.fit(activations, k=16)      # doctest: +SKIP
    >>> code = dictionary.encode(activations)            # doctest: +SKIP

    Args:
        data: ``(n, d)`` rows as a torch tensor or anything numpy reads, of any float type; a list of such arrays; an
            :class:`~unweave.activations.ActivationStore`; a :class:`~unweave.sources.Source`; or an iterator of
            arrays (or of ``(rows, target)`` pairs). With ``n_rows``, an iterator is read as training goes, so it may
            be endless; if it ends early, training goes on over the rows it gave (the first 2 GB of them). Without
            ``n_rows`` it is read into memory first.
        arch: the architecture, see :func:`unweave.dictionaries.names`.
        n_features: number of features; ``expansion * d`` when None.
        k: features per row to aim at, under whatever name the architecture has for it; when None, an eighth of d,
            at most 32.
        target: rows to predict instead of the input (a transcoder), as many as in ``data``.
        side: ``(n, d_side)`` side inputs, for architectures that take some (g_sae: gradients), as many as rows.
        n_rows: rows to train on in all; when None, ``epochs`` passes over the data, or else one pass, but at least
            1,500 steps (300 passes, if those are fewer).
        folder: where to keep checkpoints, metrics and the dictionary; the same call goes on after a kill.
        device: "auto" takes an NVIDIA card if there is one.
        options: any other field of the architecture's config or of
            :class:`~unweave.training.TrainingConfig` (``lr``, ``batch_size``, ...).

    Returns:
        The dictionary, in eval mode, for rows in the units of ``data``. What looks wrong after training is logged as
        warnings of the logger "unweave".

    Raises:
        UnweaveError: for rows that are not ``(n, d)``, none at all, NaN or infinity among them, an unknown
            architecture or option, or ``k > n_features``.
    """
    rows = rows_of(data, target, side, read_all=n_rows is None)
    trained = fit_rows(
        rows,
        arch,
        n_features=n_features if n_features is not None else expansion * rows.source.d_in,
        k=k,
        n_rows=n_rows,
        epochs=epochs,
        folder=folder,
        seed=seed,
        device=device,
        trackers=trackers,
        options=options,
    )
    for sentence in trained.health:
        logging.getLogger("unweave").warning(sentence)
    return trained.dictionary


def fit_rows(
    rows: Rows,
    arch: str,
    *,
    n_features: int,
    k: int | None,
    n_rows: int | None,
    epochs: float | None,
    folder: str | Path | None,
    seed: int,
    device: str,
    trackers: Iterable[str | Tracker] | str | Tracker,
    options: dict[str, Any],
) -> Trained:
    """What :func:`fit` does once it has its rows."""
    kind = dictionaries.get(arch)
    ours, theirs = _split(options, kind)
    ours.setdefault("batch_size", batch_size_for(rows.n_rows or n_rows))
    if rows.n_rows is not None:
        ours.setdefault("ring_rows", max(1, min(65_536, rows.n_rows)))
    config = TrainingConfig(n_rows=_total(n_rows, epochs, rows.n_rows, ours["batch_size"]), seed=seed, **ours)
    theirs = {**_sparsity(kind, k, rows.source.d_in, n_features, theirs), **theirs}
    theirs = {**parts_option(kind, rows.source, theirs), **theirs}
    if rows.has_target and "subtract_bias" in kind.Config.model_fields:
        theirs.setdefault("subtract_bias", False)  # the decoder's bias lives in the space of the target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dictionary = dictionaries.build(arch, rows.source.d_in, n_features, rows.source.d_out, **theirs)
    return train(dictionary.to(_device(device)), RowStream(rows.source, seed=seed), config, folder, trackers=trackers)


def _split(options: dict[str, Any], kind: type[Dictionary]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the training and options of the architecture, told apart by their names."""
    training = TrainingConfig.model_fields.keys() - _RESERVED
    architecture = kind.Config.model_fields.keys() - _RESERVED
    for name in options:
        if name not in training | architecture:
            raise UnweaveError(
                f"unknown option {name!r} for {kind.name!r} ({near_names(name, sorted(training | architecture))})"
            )
    ours = {name: value for name, value in options.items() if name in training}
    return ours, {name: value for name, value in options.items() if name in architecture}


def _sparsity(
    kind: type[Dictionary], k: int | None, d_in: int, n_features: int, options: dict[str, Any]
) -> dict[str, Any]:
    field = next((name for name in ("k", "target_l0") if name in kind.Config.model_fields), None)
    if field is None:
        if k is not None:
            known = sorted(kind.Config.model_fields.keys() - _RESERVED)
            raise UnweaveError(f"{kind.name!r} has no k: set its sparsity with one of its own options, {known}")
        return {}
    if k is not None and field in options:
        raise UnweaveError(f"k={k} and {field}={options[field]!r} say the same thing twice: give one of them")
    return {field: k if k is not None else min(32, max(1, d_in // 8), n_features)}


def parts_option(kind: type[Dictionary], source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """``n_parts`` for an architecture that has such an option: how many sites a source's rows are joined of.

    Raises:
        UnweaveError: when they are of different widths, so that a number does not say where each begins.
    """
    if "n_parts" not in kind.Config.model_fields or "n_parts" in options or "site" not in source.provenance:
        return {}
    parts = source.provenance.get("parts", [])
    if len({part["width"] for part in parts}) > 1:
        found = ", ".join(f"{part['site']} ({part['width']})" for part in parts)
        raise UnweaveError(f"{kind.name!r} takes parts of one width, found {found}: choose sites of equal width")
    return {"n_parts": max(1, len(parts))}


def batch_size_for(n: int | None) -> int:
    """A sixteenth of the data as a power of two, from 32 to 2048 rows, but never more than there are."""
    return 2048 if n is None else min(n, 2048, max(32, 2 ** math.floor(math.log2(max(1, n / 16)))))


def _total(n_rows: int | None, epochs: float | None, n: int | None, batch_size: Any) -> int:
    if n_rows is not None:
        if epochs is not None:
            raise UnweaveError(f"n_rows={n_rows} and epochs={epochs} both set the length: give one of them")
        return n_rows
    if epochs is not None:
        if n is None:
            raise UnweaveError("epochs needs data of known length: give n_rows instead")
        if epochs <= 0:
            raise UnweaveError(f"epochs: expected a number above 0, found {epochs}")
        return max(1, round(epochs * n))
    least = _MIN_STEPS * batch_size if isinstance(batch_size, int) else 1  # a wrong batch_size is told by the config
    return least if n is None else max(n, min(least, _MAX_PASSES * n))


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UnweaveError(f"device {name!r} is not to be had ({reason}): use 'cpu', 'cuda' or 'auto'") from None
    return name
