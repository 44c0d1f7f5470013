"""One feature of a store, and the small records it is read through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from unweave.features._tally import N_BINS

if TYPE_CHECKING:
    from unweave.features.store import FeatureStore

MAX_SHOWN_BINS = 40


@dataclass(frozen=True)
class Context:
    """A window of tokens around the position where a feature peaks, with the feature's value on each.

    Attributes:
        document: number of the document. position: of the peak in its document, in tokens.
        tokens: texts, which joined give the text of the window. values: one per token, 0 where it is silent.
        peak: index into ``tokens``. value: the value there (it may be negative). item: the store's item.
    """

    document: int
    position: int
    tokens: list[str]
    values: list[float]
    peak: int
    value: float
    item: int

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def shown_peak(self) -> int:
        """The token to mark: the peak, or the one before it that shows the character the peak is part of."""
        shown = self.peak
        while shown > 0 and not self.tokens[shown]:
            shown -= 1
        return shown

    def marked(self) -> str:
        """One line of text with the peak as »token«."""
        marked = [f"»{t}«" if i == self.shown_peak else t for i, t in enumerate(self.tokens)]
        return "".join(marked).replace("\n", "↵")

    def __str__(self) -> str:
        return f"{self.value:.3g}  {self.marked()}"


@dataclass(frozen=True)
class Quantile:
    """Contexts drawn evenly from the firings with ``low <= |value| <= high``."""

    low: float
    high: float
    contexts: list[Context]


@dataclass(frozen=True)
class Origin:
    """The row of the data that an atom is, for dictionaries whose atoms are rows.

    Attributes:
        document, position: where the row came from. before, text, after: the tokens around it and its own.
    """

    document: int
    position: int
    before: str
    text: str
    after: str

    def __str__(self) -> str:
        return f"{self.before}»{self.text}«{self.after}".replace("\n", "↵")


@dataclass(frozen=True)
class FeatureSummary:
    """One line of a list of features.

    ``snippet`` is the best context, cut short; None for a dead feature. ``relative`` and ``origin`` as of a Feature.
    """

    index: int
    density: float
    n_firing: int
    n_items: int
    max_value: float
    mean_value: float
    top_tokens: list[str]
    snippet: Context | None
    relative: float | None = None
    origin: Origin | None = None

    @property
    def snippet_tokens(self) -> list[str]:
        return self.snippet.tokens if self.snippet else []

    @property
    def snippet_values(self) -> list[float]:
        return self.snippet.values if self.snippet else []

    @property
    def snippet_peak(self) -> int:
        return self.snippet.peak if self.snippet else -1

    def __str__(self) -> str:
        text = self.snippet.marked() if self.snippet else "(never fired)"
        return f"{self.index:>7}  {_percent(self.density):>8}  {self.max_value:>8.3g}  {text}"


@dataclass(frozen=True)
class FeaturePage:
    """Some rows of a list, and how many there are in all."""

    rows: list[FeatureSummary]
    total: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[FeatureSummary]:
        return iter(self.rows)

    def __getitem__(self, row: int) -> FeatureSummary:
        return self.rows[row]

    def __repr__(self) -> str:
        head = f"{len(self.rows)} of {self.total:,} features\n{'index':>7}  {'density':>8}  {'max':>8}"
        return "\n".join([head, *(str(row) for row in self.rows)])


class Feature:
    """What one feature of a dictionary answers to. Read from disk when asked for.

    Attributes:
        index: its number.
    """

    def __init__(self, store: FeatureStore, index: int) -> None:
        self._store, self.index = store, index

    # ---- numbers ------------------------------------------------------------------------------------------------

    @property
    def n_firing(self) -> int:
        """Rows in which its value is not zero."""
        return int(self._store.columns["n_firing"][self.index])

    @property
    def n_negative(self) -> int:
        """Rows in which its value is below zero."""
        return int(self._store.columns["n_negative"][self.index])

    @property
    def n_items(self) -> int:
        """Items in which it fires at least once."""
        return int(self._store.columns["n_items"][self.index])

    @property
    def density(self) -> float:
        """Share of the activation rows in which it fires."""
        return float(self._store.table["density"][self.index])

    @property
    def max_value(self) -> float:
        """Largest ``|value|``."""
        return float(self._store.columns["maximum"][self.index])

    @property
    def mean_value(self) -> float:
        """Mean ``|value|`` of the rows in which it fires."""
        return float(self._store.table["mean_value"][self.index])

    @property
    def is_dead(self) -> bool:
        return self.n_firing == 0

    @property
    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """``(edges (b + 1,), counts (b,))`` of ``|value|`` where it fires; the counts sum to ``n_firing``.

        The bins are equal, reach from the smallest to the largest value, and are 40 at most.
        """
        columns = self._store.columns
        a, b = columns["histogram_offsets"][self.index : self.index + 2]
        filled = columns["histogram_bin"][a:b]
        if len(filled) == 0:
            return np.array([0.0, 1.0]), np.zeros(1, "i8")
        fine = np.zeros(N_BINS, "i8")
        fine[filled] = columns["histogram_count"][a:b]
        first, n = int(filled[0]), int(filled[-1] - filled[0]) + 1
        step = -(-n // MAX_SHOWN_BINS)
        n_shown = -(-n // step)
        # np.add.reduceat sums what is left in the last bin, also past the histogram's end.
        counts = np.add.reduceat(fine[first : first + n], np.arange(0, n, step))
        width = 2.0 ** int(columns["exponent"][self.index]) / N_BINS
        return (first + step * np.arange(n_shown + 1)) * width, counts

    # ---- contexts -----------------------------------------------------------------------------------------------

    @cached_property
    def top(self) -> list[Context]:
        """Contexts of the items with the largest ``|value|``, exact, one per item, largest first."""
        return self.contexts()

    def contexts(self, n: int | None = None, before: int | None = None, after: int | None = None) -> list[Context]:
        """Like :attr:`top`, the first ``n``, with another number of tokens before and after the peak."""
        tokens, values = self._store.entries("top", self.index)
        pairs = list(zip(tokens.tolist(), values.tolist()))[:n]
        return [self._store.context(self.index, token, value, before, after) for token, value in pairs]

    def texts(self, n: int | None = None) -> list[str]:
        """The text of the first ``n`` top contexts."""
        return [context.text for context in self.top[:n]]

    @cached_property
    def quantiles(self) -> list[Quantile]:
        """Contexts from all over the range of values, the highest interval first.

        The sampled firings (at most ``config.n_sample``, uniform over all firings) are put in order of ``|value|``
        and cut into intervals of equally many; the intervals together reach from 0 to the maximum. Of each a few
        are shown, different items if possible.
        """
        config = self._store.config
        tokens, values = self._store.entries("sample", self.index)
        order = np.argsort(np.abs(values), kind="stable")
        groups = [g for g in np.array_split(order, config.n_intervals) if len(g)]
        # array_split puts the longer groups first, which is as good as any other rule.
        edges = [0.0, *(float(abs(values[g[0]])) for g in groups[1:]), self.max_value]
        return [
            Quantile(edges[i], edges[i + 1], self._drawn(np.sort(groups[i]), tokens, values, config.per_interval))
            for i in reversed(range(len(groups)))
        ]

    def _drawn(self, group: np.ndarray, tokens: np.ndarray, values: np.ndarray, n: int) -> list[Context]:
        """``n`` of a group, which is in the order of the sample's hashes, so its start is a fair draw."""
        _, fresh = np.unique(self._store.item_of(tokens[group]), return_index=True)
        fresh = np.sort(fresh)
        again = np.setdiff1d(np.arange(len(group)), fresh)
        chosen = group[np.concatenate([fresh, again])[:n]]
        chosen = chosen[np.argsort(-np.abs(values[chosen]), kind="stable")]
        return [self._store.context(self.index, int(tokens[i]), float(values[i])) for i in chosen]

    # ---- relations ----------------------------------------------------------------------------------------------

    @property
    def positive_logits(self) -> list[tuple[str, float]]:
        """Output tokens it raises most: ``(token, logit per unit of value)``. Empty without a language model."""
        return self._store.logits("positive", self.index)

    @property
    def negative_logits(self) -> list[tuple[str, float]]:
        """Output tokens it lowers most."""
        return self._store.logits("negative", self.index)

    @property
    def similar(self) -> list[tuple[int, float]]:
        """``(feature, cosine of decoder directions)``, nearest first."""
        return self._store.pairs("similar_feature", "similar_cosine", self.index)

    @property
    def cofiring(self) -> list[tuple[int, float, float]]:
        """``(feature, probability that it fires where this one does, lift = probability / its density)``.

        From the sampled firings: an estimate from at most ``config.n_sample``, exact for features that fire less.
        """
        density = self._store.table["density"]
        found = self._store.pairs("cofiring_feature", "cofiring_share", self.index)
        return [(other, share, share / float(density[other])) for other, share in found]

    @property
    def top_tokens(self) -> list[tuple[str, float]]:
        """Tokens it fires on most, with their share of its sampled firings (estimated as in :attr:`cofiring`)."""
        found = self._store.pairs("top_tokens", "top_tokens_share", self.index)
        return [(self._store.label(token), share) for token, share in found]

    @property
    def part_shares(self) -> list[tuple[str, float]]:
        """``(part, share of the atom's norms that is there)``, norms in units of the part's typical row.

        Empty for rows of one part, and for an atom of norm 0.
        """
        norms = self._store.columns["part_norms"][self.index] if "part_norms" in self._store.columns else np.zeros(1)
        return list(zip(self._store.part_labels, (norms / norms.sum()).tolist())) if norms.sum() > 0 else []

    @property
    def part_names(self) -> dict[str, str]:
        """What letters among the parts stand for."""
        return self._store.part_names

    @property
    def relative_norm(self) -> float | None:
        """Of rows of two parts, how much of the atom's norm is in the second: 0 only in the first, 1 only there.

        None for rows of another number of parts, nan for an atom of norm 0.
        """
        return float(self._store.table["relative"][self.index]) if "relative" in self._store.table else None

    @property
    def origin(self) -> Origin | None:
        """The row of the data that its atom is; None where atoms are no rows, or this one was not found."""
        return self._store.origin(self.index)

    # ---- shown --------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        head = f"Feature {self.index}"
        if self.is_dead:
            lines = [f"{head}: never fired in {self._store.n_rows:,} rows"]
        else:
            lines = [
                f"{head}: fires on {_percent(self.density)} of rows ({self.n_firing:,}) in {self.n_items:,} items, "
                f"max {self.max_value:.3g}, mean {self.mean_value:.3g}"
            ]
        rows = {
            "is row of": [str(self.origin)] if self.origin else [],
            "lies in": [f"{part} {share:.0%}" for part, share in self.part_shares],
            "top tokens": [f"{t!r} {share:.0%}" for t, share in self.top_tokens[:6]],
            "raises": [f"{t!r} {v:+.2f}" for t, v in self.positive_logits[:6]],
            "lowers": [f"{t!r} {v:+.2f}" for t, v in self.negative_logits[:6]],
            "similar": [f"{f} ({cosine:.2f})" for f, cosine in self.similar[:6]],
            "fires with": [f"{f} ({p:.0%}, {lift:.3g}x)" for f, p, lift in self.cofiring[:6]],
        }
        lines += [f"  {name:<11}{'  '.join(shown)}" for name, shown in rows.items() if shown]
        lines += [f"  {c.value:>9.3g}  {c.marked()}" for c in self.contexts(5, before=12, after=8)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from unweave.features.card import feature_card_html

        return feature_card_html(self)


def _percent(share: float) -> str:
    return f"{share:.3g}%" if share == 0 else f"{100 * share:.2g}%"
