"""Verified load: does a checkpoint do on real rows what it is said to do, and if not, which known trap explains it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.formats._fold import Parts, fold
from unweave.formats.catalogue import resolve
from unweave.formats.registry import Format, _known, get, opened, recognise
from unweave.metrics import fvu as measure_fvu

Sites = Mapping[str, tuple[Tensor, Tensor | None]]  # rows and targets by the name of the site
Recovered = Callable[[Dictionary, str | None], float | None]

NOTHING_DECLARED = (
    "verify needs something to compare with: the declared l0= (--l0), fvu= (--fvu) or ce_recovered= (--ce-recovered)"
)
_TRIED_IN_MODEL = 3  # explanations whose loss is measured, where one is declared


@dataclass(frozen=True)
class Measured:
    """What a dictionary does on the rows.

    Attributes:
        l0: features per row. fvu: the fraction of variance unexplained. dead: the share of features that fire on no
            row. ce_recovered: the share of the model's loss recovered; None where no model was at hand.
        worst: the share of the squared error that is of one row alone, the worst.
    """

    l0: float
    fvu: float
    dead: float
    ce_recovered: float | None = None
    worst: float = 0.0


@dataclass(frozen=True)
class Declared:
    """What a checkpoint is said to do, by its card, its maker or its own files; None is for what nobody says."""

    l0: float | None = None
    fvu: float | None = None
    ce_recovered: float | None = None

    def near(self, measured: Measured) -> bool:
        """Within a fifth of the L0, at most 0.05 more FVU and 0.05 less CE recovered; never worse than the mean row."""
        return self._within(measured, 0.2, 0.5, 0.05)

    def close(self, measured: Measured) -> bool:
        """Nearer than chance has it: within a twentieth of the L0, and 0.02 of the others."""
        return self._within(measured, 0.05, 0.25, 0.02)

    def _within(self, measured: Measured, share: float, least: float, margin: float) -> bool:
        if self.l0 is not None and abs(measured.l0 - self.l0) > max(share * self.l0, least):
            return False
        if not measured.fvu <= (1.0 if self.fvu is None else self.fvu + margin):
            return False
        if self.ce_recovered is None or measured.ce_recovered is None:
            return True
        return measured.ce_recovered >= self.ce_recovered - margin

    def prefers(self, measured: Measured, to: Measured) -> bool:
        """Whether ``measured`` is what was declared, rather than ``to``.

        What is near may be wrong all the same: the site next to the right one often is near. It gives way to what is
        close and leaves at least a tenth less of the variance unexplained.
        """
        if not self.near(to):
            return self.near(measured)
        return self.close(measured) and to.fvu - measured.fvu >= max(0.1 * to.fvu, 0.01)

    def distance(self, measured: Measured) -> float:
        """How far an FVU is from the declared one, or from nothing where none is declared."""
        return measured.fvu if self.fvu is None else abs(measured.fvu - self.fvu)


@dataclass(frozen=True)
class Verdict(Measured):
    """What was measured on the rows, beside what was declared.

    Attributes:
        declared: what it was compared with. matches: whether it is near.
        trap: what explains the difference, in words; None where nothing does, or nothing has to.
        repaired: the checkpoint with that put right, to ``fold``; None likewise, and where the site is what is wrong.
        after: what is measured with that put right; None likewise.
        notes: what was taken for granted.
    """

    declared: Declared = Declared()
    matches: bool = True
    trap: str | None = None
    repaired: Parts | None = None
    after: Measured | None = None
    notes: tuple[str, ...] = field(default=())


def verify(
    thing: str | Path,
    rows: Tensor,
    target: Tensor | None = None,
    *,
    l0: float | None = None,
    fvu: float | None = None,
    ce_recovered: float | None = None,
    recovered: Recovered | None = None,
    others: Sites | Callable[[], Sites] | None = None,
    format: str | None = None,
    **options: Any,
) -> Verdict:
    """Measure a checkpoint on some thousands of rows of the site it is for, against what it is declared to do.

    Near means within a fifth of the L0, an FVU of at most the declared one plus 0.05 (or of 1, if none is declared),
    and a share of the loss recovered of at least the declared one less 0.05. Unless the numbers are closer than that,
    every known trap is tried; one that brings them to the declared ones is named, that of the nearest FVU if several
    do. A k that is not in the files is taken as the declared L0, an average norm as that of the rows, and ``notes`` say
    so.

    Args:
        rows: ``(n, d_in)``, raw. target: ``(n, d_out)`` of a transcoder.
        l0, fvu, ce_recovered: declared, on its card or by its maker; at least one. An L0 (or the k that a threshold
            stands for) that its own files state is taken where none is given.
        recovered: measures the loss recovered by a dictionary, at this site (None) or one of ``others`` by name.
        others: rows and targets of other sites by name, on which it is tried as well; or a function that makes them.
            format, options: as for :func:`unweave.formats.load`.

    Raises:
        UnweaveError: when nothing is declared, or the checkpoint cannot be loaded.
    """
    if ce_recovered is not None and recovered is None:
        raise UnweaveError("a declared ce_recovered= (--ce-recovered) can only be checked with the model: give it too")
    thing, options = resolve(thing, options)
    read, declared, notes = _read(thing, rows, Declared(l0, fvu, ce_recovered), format, options)
    if declared == Declared():
        raise UnweaveError(NOTHING_DECLARED)
    target = rows if target is None else target
    here = _measure(read, rows, target)
    if recovered is not None:
        here = replace(here, ce_recovered=recovered(_folded(read), None))
    if not declared.near(here) and here.worst > 0.5:
        words = (
            f"one row of {len(rows):,} alone makes {here.worst:.0%} of the error: measure on more tokens, or other text"
        )
        notes = (*notes, words)
    verdict = Verdict(**vars(here), declared=declared, matches=declared.near(here), notes=notes)
    if declared.fvu is not None and declared.close(here):
        return verdict
    found: list[tuple[Measured, str, Parts | None, str | None]] = []
    for name, (instead, goal) in (others() if callable(others) else others or {}).items():
        if instead.shape[1] == rows.shape[1] and (instead if goal is None else goal).shape[1] == target.shape[1]:
            there = _measure(read, instead, instead if goal is None else goal)
            found.append((there, f"the rows are of another site: it is for those of {name}", None, name))
    if isinstance(read, Parts):  # the other traps are of matrices that are folded
        found += [(_measure(other, rows, target), trap, other, None) for trap, other in traps(read, rows, declared.l0)]
    best = sorted((one for one in found if declared.prefers(one[0], here)), key=lambda one: declared.distance(one[0]))
    for after, trap, repaired, name in best[: 1 if ce_recovered is None else _TRIED_IN_MODEL]:
        if recovered is not None:
            after = replace(after, ce_recovered=recovered(_folded(repaired or read), name))
        if declared.prefers(after, here):
            return replace(verdict, matches=False, trap=trap, repaired=repaired, after=after)
    return verdict


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
    if _keeps_k(parts) and l0 is not None and round(l0) >= 1:
        k = min(round(l0), len(parts.W_enc))
        yield f"k is {k}, not {parts.options['k']}", replace(parts, options={**parts.options, "k": k})


def _read(
    thing: str | Path, rows: Tensor, declared: Declared, format: str | None, options: dict[str, Any]
) -> tuple[Parts | Dictionary, Declared, tuple[str, ...]]:
    """The checkpoint, with what its files do not say taken from the rows and what is declared, and what is declared."""
    with opened(thing) as checkpoint:
        kind = get(format) if format else recognise(checkpoint)
        facts = kind.inspect(checkpoint, **_known(kind, options))
        if declared.l0 is None:
            declared = replace(declared, l0=facts.l0)
        notes = []
        guesses: dict[str, tuple[float | None, str]] = {
            "k": (None if declared.l0 is None else max(1, round(declared.l0)), "the declared L0"),
            "norm": (float(rows.norm(dim=1).mean()), "the average norm of these rows"),
        }
        for name, (value, whence) in guesses.items():
            if facts.missing and value is not None and name in kind.options and name not in options:
                told = kind.inspect(checkpoint, **options, **{name: value})
                if told.missing is None:
                    facts, options = told, {**options, name: value}
                    notes.append(f"{name} is not in its files: taken as {value:.6g}, {whence}")
        if facts.missing:
            raise UnweaveError(f"{checkpoint.called}: {facts.missing}")
        whole = type(kind).parts is Format.parts  # nothing is translated, so there is nothing to take apart
        read = kind.read(checkpoint, **options) if whole else kind.parts(checkpoint, **options)
    if isinstance(read, Parts):
        if declared.l0 is None and read.threshold is not None and "k" in read.options:
            declared = replace(declared, l0=float(read.options["k"]))
        if _keeps_k(read) and declared == Declared(declared.l0):
            notes.append("its L0 is its k on any rows, so it tells little: declare an FVU, or CE recovered, as well")
    return read, declared, tuple(notes)


def _keeps_k(parts: Parts) -> bool:
    return "k" in parts.options and parts.threshold is None


def _folded(read: Parts | Dictionary) -> Dictionary:
    return fold(read) if isinstance(read, Parts) else read.eval()


@torch.no_grad()
def _measure(read: Parts | Dictionary, rows: Tensor, target: Tensor) -> Measured:
    dictionary = _folded(read)
    firing, made, fired = 0.0, [], torch.zeros(dictionary.n_features, dtype=torch.bool)
    for chunk in rows.split(1024):
        code = dictionary.encode(chunk)
        firing += float(code.l0().sum())
        fired[code.indices[code.values != 0].long()] = True
        made.append(dictionary.reconstruct(chunk, code))
    reconstruction, goal = torch.cat(made), target.float()
    errors = (goal - reconstruction).square().sum(1)
    return Measured(
        firing / max(1, len(rows)),
        float(measure_fvu(goal, reconstruction)),
        float((~fired).float().mean()),
        worst=float(errors.max() / errors.sum().clamp_min(1e-30)),
    )
