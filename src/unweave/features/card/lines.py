"""How one context is laid out: its tokens in runs around the peak, with shades for their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from unweave.features.card.formatting import direction, plain
from unweave.features.card.formatting import value as value_text

if TYPE_CHECKING:
    from unweave.features.feature import Context, Feature
    from unweave.features.store import FeatureStore

LEVELS = 10
"""Shades of a highlighted token; they are classes in the style sheet, since the pages allow no inline styles."""

NEAR = 18
"""Tokens kept on each side of the peak in the short view."""

AROUND = 256
"""Tokens kept on each side in the long view, which is the whole item for usual context sizes."""


@dataclass(frozen=True)
class Run:
    """A token that fires, or a stretch of silent tokens (then ``value`` is None)."""

    text: str
    value: float | None = None
    level: int = 0
    index: int = -1
    at_peak: bool = False

    @property
    def space(self) -> str:
        """The space a token begins with, which stays outside its shade."""
        return " " if self.value is not None and self.text.startswith(" ") and self.text != " " else ""

    @property
    def body(self) -> str:
        return self.text[len(self.space) :]

    @property
    def css(self) -> str:
        return f"tok {'n' if (self.value or 0) < 0 else 'h'}{self.level}" + (" peak" if self.at_peak else "")

    @property
    def tip(self) -> str:
        return f"{plain(self.text).strip() or '(space)'}  {value_text(self.value)}"


@dataclass(frozen=True)
class Line:
    """One context: far text, near text, the peak, near text, far text. The far parts hide in the short view."""

    value: float
    document: int
    position: int
    direction: str
    far_before: list[Run]
    before: list[Run]
    peak: list[Run]
    after: list[Run]
    far_after: list[Run]


def shade(value: float, max_value: float) -> int:
    """1 to ``LEVELS`` by the share of the largest value; 0 for a silent token."""
    if value == 0 or not math.isfinite(value):
        return 0
    share = abs(value) / (abs(max_value) or abs(value))
    return max(1, min(LEVELS, math.ceil(share * LEVELS)))


def runs(
    tokens: Sequence[str], values: Sequence[float], max_value: float, *, first: int = 0, peak: int = -1
) -> list[Run]:
    """Tokens as runs: each firing token by itself, silent ones joined. ``first`` numbers the first token."""
    made: list[Run] = []
    silent: list[str] = []

    def close() -> None:
        if silent:
            made.append(Run("".join(silent)))
            silent.clear()

    for index, (token, value) in enumerate(zip(tokens, values), start=first):
        level = shade(float(value), max_value)
        if level or index == peak:
            close()
            made.append(Run(token, float(value), level, index, index == peak))
        else:
            silent.append(token)
    close()
    return made


def join_parts(tokens: Sequence[str], values: Sequence[float], peak: int) -> tuple[list[str], list[float], int]:
    """Fold tokens without text into the one before them.

    A character cut over several tokens is shown on the first; the others are "" and could not be pointed at. The
    joined token has the value that is largest in size.
    """
    texts: list[str] = []
    sizes: list[float] = []
    new_peak = 0
    for index, (token, value) in enumerate(zip(tokens, values)):
        if token or not texts:
            texts.append(token)
            sizes.append(float(value))
        elif abs(value) > abs(sizes[-1]):
            sizes[-1] = float(value)
        if index == peak:
            new_peak = len(texts) - 1
    return texts, sizes, new_peak


def lay_out(context: Any, max_value: float, near: int = NEAR) -> Line:
    """A store's ``Context`` ready for the page."""
    tokens, values, peak = join_parts(context.tokens, context.values, int(context.peak))
    start, stop = max(0, peak - near), min(len(tokens), peak + 1 + near)

    def part(a: int, b: int) -> list[Run]:
        return runs(tokens[a:b], values[a:b], max_value, first=a, peak=peak)

    return Line(
        value=float(context.value),
        document=int(context.document),
        position=int(context.position),
        direction=direction("".join(tokens)),
        far_before=part(0, start),
        before=part(start, peak),
        peak=part(peak, peak + 1),
        after=part(peak + 1, stop),
        far_after=part(stop, len(tokens)),
    )


def snippet(tokens: Sequence[str], values: Sequence[float], max_value: float) -> list[Run]:
    """A short stretch of tokens, for lists and cards."""
    tokens, values, _ = join_parts(tokens, values, -1)
    made = runs(tokens, values, max_value)
    if made and made[0].text.strip():
        made[0] = replace(made[0], text=made[0].text.lstrip(" "))
    return made


@dataclass(frozen=True)
class Interval:
    """Contexts whose values lie in one interval."""

    low: float
    high: float
    lines: list[Line]


@dataclass(frozen=True)
class FeatureLines:
    """A feature with its contexts laid out, each with as much of its item as is shown. ``n_rows``: of the store."""

    feature: Feature
    top: list[Line]
    intervals: list[Interval]
    n_rows: int

    @classmethod
    def of(cls, store: FeatureStore, index: int, around: int = AROUND) -> FeatureLines:
        """Read and lay out a feature's contexts, with ``around`` tokens on each side in the long view."""
        feature = store[index]
        largest = feature.max_value
        top = [lay_out(c, largest) for c in feature.contexts(before=around, after=around)]
        intervals = [
            Interval(q.low, q.high, [lay_out(wider(store, index, c, around), largest) for c in q.contexts])
            for q in feature.quantiles
        ]
        return cls(feature, top, intervals, store.n_rows)


def wider(store: FeatureStore, feature: int, context: Context, around: int) -> Context:
    """The same context with more of its item around it."""
    items = store.items
    token = int(items.offsets[context.item]) + context.position - int(items.start[context.item])
    return store.context(feature, token, context.value, around, around)
