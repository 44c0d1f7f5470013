"""Verified load: does a checkpoint do on real rows what it is said to do, and if not, which known trap explains it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.formats._fold import Parts, fold
from unweave.formats.catalogue import resolve
from unweave.formats.registry import Format, get, opened, recognise
from unweave.metrics import fvu


@dataclass(frozen=True)
class Verdict:
    """What was measured on the rows, beside what was declared.

    Attributes:
        l0, fvu, dead: measured: features per row, the fraction of variance unexplained, and the share of features
            that fire on no row.
        matches: whether they are near what was declared.
        trap: what explains the difference, in words; None where nothing does, or nothing has to.
        repaired: the checkpoint with that put right, to ``fold``; None likewise.
    """

    l0: float
    fvu: float
    dead: float
    matches: bool
    trap: str | None = None
    repaired: Parts | None = None


def verify(
    thing: str | Path,
    rows: Tensor,
    target: Tensor | None = None,
    *,
    l0: float | None = None,
    fvu: float | None = None,
    others: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,
    format: str | None = None,
    **options: Any,
) -> Verdict:
    """Measure a checkpoint on some thousands of rows of the site it is for, against its declared L0 or FVU.

    Near means within a fifth of the L0, and an FVU of at most the declared one plus 0.05. On a mismatch every known
    trap is tried; one that brings the numbers to the declared ones is named, the nearest if several do.

    Args:
        rows: ``(n, d_in)``, raw. target: ``(n, d_out)`` of a transcoder. l0, fvu: declared, on its card or by its
            maker; at least one. others: rows and targets of other sites by name, on which it is tried where it does
            not do here what it should. format, options: as for :func:`unweave.formats.load`.

    Raises:
        UnweaveError: when nothing is declared, or the checkpoint cannot be loaded.
    """
    if l0 is None and fvu is None:
        raise UnweaveError("verify needs something to compare with: the declared l0=, fvu=, or both")
    thing, options = resolve(thing, options)
    with opened(thing) as checkpoint:
        kind = get(format) if format else recognise(checkpoint)
        facts = kind.inspect(checkpoint, **options)
        if facts.missing:
            raise UnweaveError(f"{checkpoint.called}: {facts.missing}")
        if type(kind).read is not Format.read:
            raise UnweaveError(f"{kind.title}'s dictionaries need no verification: nothing in them is translated")
        parts = kind.parts(checkpoint, **options)
    target = rows if target is None else target
    measured = _measure(parts, rows, target)
    if _distance(measured, l0, fvu) <= 1:
        return Verdict(*measured, matches=True)
    tried: list[tuple[float, str, Parts | None]] = []
    for name, (instead, goal) in (others or {}).items():
        if instead.shape[1] == rows.shape[1]:
            there = _measure(parts, instead, instead if goal is None else goal)
            tried.append((_distance(there, l0, fvu), f"the rows are of another site: it is for those of {name}", None))
    if isinstance(parts, Parts):  # the other traps are of matrices that are folded
        for trap, other in traps(parts, rows, l0):
            tried.append((_distance(_measure(other, rows, target), l0, fvu), trap, other))
    best = min(tried, key=lambda t: t[0], default=None)
    if best is None or best[0] > 1:
        return Verdict(*measured, matches=False)
    return Verdict(*measured, matches=False, trap=best[1], repaired=best[2])


def traps(parts: Parts, rows: Tensor, l0: float | None) -> Iterator[tuple[str, Parts]]:
    """The ways in which files are silently read wrong, each put right."""
    if parts.b_dec is not None and parts.W_enc.shape[1] == parts.W_dec.shape[1]:
        subtracts = parts.b_pre is not None
        says = "subtracts b_dec, and must not" if subtracts else "must subtract b_dec from its input, and does not"
        yield f"the encoder {says}", replace(parts, b_pre=None if subtracts else parts.b_dec)
    if parts.W_enc.shape[0] == parts.W_enc.shape[1]:
        yield "the encoder is transposed", replace(parts, W_enc=parts.W_enc.T)
        if parts.W_dec.shape[0] == parts.W_dec.shape[1]:
            yield "the decoder is transposed", replace(parts, W_dec=parts.W_dec.T)
            yield "both matrices are transposed", replace(parts, W_enc=parts.W_enc.T, W_dec=parts.W_dec.T)
    norm = float(rows.norm(dim=1).mean())
    if parts.in_scale == parts.out_scale == 1:
        for words, scale in (("sqrt(d)", rows.shape[1] ** 0.5 / norm), ("1", 1 / norm)):
            scaled = replace(parts, in_scale=scale, out_scale=scale)
            yield f"rows must be scaled to an average norm of {words}, and are not", scaled
    else:
        yield "rows are scaled, and must not be", replace(parts, in_scale=1.0, out_scale=1.0)
    if parts.threshold is not None and parts.in_scale != 1:
        where = "of scaled rows, and is taken for that of raw ones" if parts.raw_threshold else "that of raw rows"
        yield f"the threshold is {where}", replace(parts, raw_threshold=not parts.raw_threshold)
    if "k" in parts.options and parts.threshold is None and l0 is not None and round(l0) >= 1:
        k = min(round(l0), len(parts.W_enc))
        yield f"k is {k}, not {parts.options['k']}", replace(parts, options={**parts.options, "k": k})


@torch.no_grad()
def _measure(parts: Parts | Dictionary, rows: Tensor, target: Tensor) -> tuple[float, float, float]:
    dictionary = fold(parts) if isinstance(parts, Parts) else parts.eval()
    firing, made, fired = 0.0, [], torch.zeros(dictionary.n_features, dtype=torch.bool)
    for chunk in rows.split(1024):
        code = dictionary.encode(chunk)
        firing += float(code.l0().sum())
        fired[code.indices[code.values != 0].long()] = True
        made.append(dictionary(chunk))
    return firing / max(1, len(rows)), float(fvu(target.float(), torch.cat(made))), float((~fired).float().mean())


def _distance(measured: tuple[float, float, float], l0: float | None, declared: float | None) -> float:
    """1 is as far as what still counts as near."""
    from_l0 = 0.0 if l0 is None else abs(measured[0] - l0) / max(0.2 * l0, 0.5)
    return max(from_l0, 0.0 if declared is None else (measured[1] - declared) / 0.05)
