"""FeatureStore: a folder of memory-mapped columns, opened in milliseconds."""

from __future__ import annotations

import builtins
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from unweave.batch import ActivationBatch, Items
from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.features._columns import REBUILD, Columns, read_manifest, verify_columns
from unweave.features._derive import fold
from unweave.features._tokens import Vocabulary, decode_tokens, token_label
from unweave.features.config import IndexConfig
from unweave.features.feature import Context, Feature, FeaturePage, FeatureSummary, Origin
from unweave.kernels.pattern import Pattern
from unweave.sources import part_labels, part_names

SORT_KEYS = ("index", "density", "max_value", "mean_value", "n_items", "relative")
SNIPPET_BEFORE, SNIPPET_AFTER = 8, 5
_TOKENS = 1 << 16  # read at once by batches()


class FeatureStore:
    """Every feature of a dictionary with its contexts and statistics, and the codes of all tokens.

    The rows of :attr:`codes` are all tokens of the items, also those without an activation row (their code is
    empty), so a window of tokens is a slice. ``store[i]`` is a :class:`Feature`, ``store[10:20]`` a list of them.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.columns = Columns(folder)
        try:
            self.config = IndexConfig.from_dict(manifest["config"])
            counts = manifest["counts"]
            self.n_features, self.n_rows, self.n_items, self.n_tokens = (
                int(counts[name]) for name in ("n_features", "n_rows", "n_items", "n_tokens")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UnweaveError(f"the manifest of {folder} is damaged ({error!r}); {REBUILD}") from None

    @classmethod
    def open(cls, folder: str | Path) -> FeatureStore:
        """Open a store. Nothing but the manifest is read; every file's size is compared with it.

        Raises:
            UnweaveError: when there is no store, or a file of it is missing or cut short.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder))

    @staticmethod
    def merge(stores: Sequence[FeatureStore], folder: str | Path) -> FeatureStore:
        """See :func:`unweave.features.merge`."""
        from unweave.features.build import merge

        return merge(stores, folder)

    def verify(self) -> None:
        """Compare every file with its sha256.

        Raises:
            UnweaveError: naming the first one that is damaged.
        """
        verify_columns(self.folder, self.manifest)

    # ---- features -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.n_features

    @overload
    def __getitem__(self, feature: int) -> Feature: ...
    @overload
    def __getitem__(self, feature: slice) -> builtins.list[Feature]: ...
    def __getitem__(self, feature: int | slice) -> Feature | builtins.list[Feature]:
        if isinstance(feature, slice):
            return [Feature(self, i) for i in range(*feature.indices(len(self)))]
        index = int(feature)
        if not -len(self) <= index < len(self):
            raise UnweaveError(f"no feature {index}: this store has features 0 to {len(self) - 1}")
        return Feature(self, index % len(self))

    def __iter__(self) -> Iterator[Feature]:
        return (Feature(self, i) for i in range(len(self)))

    def __repr__(self) -> str:
        alive = int((self.columns["n_firing"] > 0).sum())
        return (
            f"FeatureStore({self.folder}: {self.n_features:,} features, {alive:,} of them fire, "
            f"over {self.n_rows:,} rows in {self.n_items:,} items)"
        )

    @cached_property
    def table(self) -> dict[str, np.ndarray]:
        """Columns by feature: index, density, n_firing, n_negative, n_items, max_value, mean_value.

        For rows of two parts also ``relative``, see :attr:`Feature.relative_norm`.
        """
        n_firing = self.columns["n_firing"]
        norms = self.columns["part_norms"] if "part_norms" in self.columns else np.zeros((0, 0))
        parts: dict[str, np.ndarray] = {}
        if norms.shape[1] == 2:
            with np.errstate(invalid="ignore"):  # an atom of norm 0 is in neither
                parts["relative"] = norms[:, 1] / norms.sum(axis=1)
        return {
            **parts,
            "index": np.arange(self.n_features),
            "density": n_firing / max(self.n_rows, 1),
            "n_firing": n_firing,
            "n_negative": self.columns["n_negative"],
            "n_items": self.columns["n_items"],
            "max_value": self.columns["maximum"],
            "mean_value": self.columns["total"] / np.maximum(n_firing, 1),
        }

    def list(
        self,
        sort: str = "density",
        descending: bool = True,
        search: str | None = None,
        min_density: float | None = None,
        max_density: float | None = None,
        include_dead: bool = True,
        offset: int = 0,
        limit: int = 50,
    ) -> FeaturePage:
        """A page of the list of features.

        Args:
            sort: index, density, max_value, mean_value or n_items, or relative for rows of two parts; equal ones by
                index.
            search: text to find, whatever its case, in the top tokens, logit tokens or best snippet; or a feature's
                number, which then comes first.
            min_density, max_density: bounds, both included. include_dead: also those that never fired.
            offset, limit: which rows of the result.

        Raises:
            UnweaveError: for an unknown sort key or a negative offset or limit.
        """
        if offset < 0 or limit < 0:
            raise UnweaveError(f"expected offset and limit of 0 or more, found {offset} and {limit}")
        order = self.ranked(sort, descending, search, min_density, max_density, include_dead)
        return FeaturePage([self.summary(i) for i in order[offset : offset + limit].tolist()], len(order))

    def ranked(
        self,
        sort: str = "density",
        descending: bool = True,
        search: str | None = None,
        min_density: float | None = None,
        max_density: float | None = None,
        include_dead: bool = True,
    ) -> np.ndarray:
        """The numbers of all features that :meth:`list` would show, in its order."""
        if sort not in self.sort_keys:
            raise UnweaveError(f"cannot sort features by {sort!r}: expected one of {', '.join(self.sort_keys)}")
        keep = np.ones(self.n_features, bool)
        if not include_dead:
            keep &= self.table["n_firing"] > 0
        if min_density is not None:
            keep &= self.table["density"] >= min_density
        if max_density is not None:
            keep &= self.table["density"] <= max_density
        number = None
        if search and search.strip():
            found, number = self._found(search.strip())
            keep &= found
        kept = np.flatnonzero(keep)
        column = self.table[sort][kept]
        order = kept[np.argsort(-column if descending else column, kind="stable")]
        if number is not None and keep[number]:
            order = np.concatenate([[number], order[order != number]])
        return order

    @property
    def sort_keys(self) -> tuple[str, ...]:
        """What a list can be sorted by."""
        return tuple(key for key in SORT_KEYS if key in self.table)

    @cached_property
    def part_labels(self) -> builtins.list[str]:
        """What the parts of rows are called; numbers where the provenance does not say."""
        n = self.columns["part_norms"].shape[1] if "part_norms" in self.columns else 0
        labels = part_labels(self.manifest.get("provenance") or {})
        return labels if len(labels) == n else [str(part) for part in range(n)]

    @cached_property
    def part_names(self) -> dict[str, str]:
        """What letters among the labels of parts stand for."""
        return part_names(self.manifest.get("provenance") or {})

    def origin(self, feature: int) -> Origin | None:
        """The row of the data that an atom is, where it was found."""
        if "origin_document" not in self.columns or self.columns["origin_document"][feature] < 0:
            return None
        ends = self.columns["origin_offsets"][3 * feature : 3 * feature + 4].tolist()
        pieces = [bytes(self.columns["origin_text"][a:b]).decode() for a, b in pairwise(ends)]
        document, position = (int(self.columns[f"origin_{name}"][feature]) for name in ("document", "position"))
        return Origin(document, position, *pieces)

    def search(self, text: str, limit: int = 50) -> FeaturePage:
        """``list(search=text)``, the densest first."""
        return self.list(search=text, limit=limit)

    def summary(self, index: int) -> FeatureSummary:
        """One line of a list."""
        feature, table = self[index], self.table
        return FeatureSummary(
            index=feature.index,
            density=feature.density,
            n_firing=feature.n_firing,
            n_items=feature.n_items,
            max_value=feature.max_value,
            mean_value=float(table["mean_value"][index]),
            top_tokens=[token for token, _ in feature.top_tokens[:5]],
            snippet=next(iter(feature.contexts(1, SNIPPET_BEFORE, SNIPPET_AFTER)), None),
            relative=feature.relative_norm,
            origin=feature.origin,
        )

    @cached_property
    def _search_index(self) -> tuple[bytes, builtins.list[int]]:
        return self.columns["search_text"].tobytes(), self.columns["search_offsets"].tolist()

    def _found(self, search: str) -> tuple[np.ndarray, int | None]:
        """Which features hold the text (jumping from hit to hit in one string), and the one whose number it is."""
        text, starts = self._search_index
        found = np.zeros(self.n_features, bool)
        needle, at = fold(search), 0
        while needle and (hit := text.find(needle, at)) >= 0:
            feature = bisect_right(starts, hit) - 1
            found[feature] = True
            at = starts[feature + 1]
        digits = search.removeprefix("#")
        number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 12 else None
        if number is None or number >= self.n_features:
            return found, None
        found[number] = True
        return found, number

    # ---- codes and items ----------------------------------------------------------------------------------------

    @cached_property
    def codes(self) -> SparseCode:
        """The codes of all tokens, ``(n_tokens, n_features)``, memory-mapped."""
        offsets, indices, values = (
            torch.from_numpy(self.columns[f"code_{c}"]) for c in ("offsets", "indices", "values")
        )
        return SparseCode.from_pattern(Pattern(offsets, indices, self.n_features), values)

    @cached_property
    def items(self) -> Items:
        """The items, memory-mapped."""
        names = ("tokens", "item_offsets", "item_document", "item_start")
        return Items(*(torch.from_numpy(self.columns[name]) for name in names))

    def batches(self) -> Iterator[tuple[ActivationBatch, SparseCode]]:
        """All items in order, some at a time, with the ``(n_rows, n_features)`` codes of their rows.

        The rows themselves are not kept: they have no width here.
        """
        offsets = self.columns["item_offsets"]
        a = 0
        while a < self.n_items:
            b = max(a + 1, int(np.searchsorted(offsets, offsets[a] + _TOKENS, side="right")) - 1)
            first, last = int(offsets[a]), int(offsets[b])
            row_token = torch.from_numpy(np.flatnonzero(self.columns["has_row"][first:last]))
            rows = torch.empty(len(row_token), 0)
            code = self.codes[first:last][row_token].to(dtype=torch.float32)
            yield ActivationBatch(rows, rows, self.items[a:b], row_token), code
            a = b

    def item_of(self, tokens: np.ndarray) -> np.ndarray:
        """The item of each token number."""
        return np.searchsorted(self.columns["item_offsets"], tokens, side="right") - 1

    def top_features(self, item: int, n: int = 10) -> builtins.list[tuple[int, float]]:
        """The features with the largest ``|value|`` anywhere in an item, as ``(feature, value)``, largest first."""
        if not 0 <= item < self.n_items:
            raise UnweaveError(f"no item {item}: this store has items 0 to {self.n_items - 1}")
        a, b = self.columns["item_offsets"][item : item + 2]
        return self.codes[int(a) : int(b)].to(dtype=torch.float32).top(n)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        if "vocabulary" not in self.manifest["columns"]:
            return None
        return Vocabulary(self.columns["vocabulary"], self.columns["vocabulary_offsets"])

    def label(self, token: int) -> str:
        """A token alone, for lists of tokens."""
        return token_label(self.vocabulary, token)

    def texts(self, first: int, last: int, item: int) -> builtins.list[str]:
        """The texts of the tokens ``first .. last`` of an item; joined, they are its text there."""
        offsets = self.columns["item_offsets"]
        start, end = int(offsets[item]), int(offsets[item + 1])
        tokens = self.columns["tokens"]
        if self.vocabulary is None or tokens[first] < 0:
            return [self._position_label(item, t, start, end, first) for t in range(first, last)]
        # Up to four tokens share a character: look a little further, or it would be cut at the window's edge.
        a, b = max(start, first - 3), min(end, last + 3)
        pieces = [self.vocabulary.bytes_of(t) for t in tokens[a:b].tolist()]
        return decode_tokens(pieces)[first - a : last - a]

    def _position_label(self, item: int, token: int, start: int, end: int, first: int) -> str:
        gap = "" if token == first else " "
        id_ = int(self.columns["tokens"][token])
        if id_ >= 0:
            return gap + token_label(None, id_)
        document, position = (
            int(self.columns["item_document"][item]),
            token - start + int(self.columns["item_start"][item]),
        )
        return f"{gap}row {document}" + (f":{position}" if end - start > 1 else "")

    # ---- what Feature reads -------------------------------------------------------------------------------------

    def context(
        self, feature: int, token: int, value: float, before: int | None = None, after: int | None = None
    ) -> Context:
        """The window around a token where a feature has ``value``; its other values come from the codes."""
        item = int(self.item_of(np.array([token]))[0])
        offsets = self.columns["item_offsets"]
        start, end = int(offsets[item]), int(offsets[item + 1])
        first = max(start, token - (self.config.before if before is None else before))
        last = min(end, token + (self.config.after if after is None else after) + 1)
        rows = self.columns["code_offsets"][first : last + 1]
        entries = slice(int(rows[0]), int(rows[-1]))
        at = np.flatnonzero(self.columns["code_indices"][entries] == feature)
        values = np.zeros(last - first)
        values[np.searchsorted(rows, at + rows[0], side="right") - 1] = self.columns["code_values"][entries][at]
        values[token - first] = value  # the exact one; the codes may be rounded to half precision
        return Context(
            document=int(self.columns["item_document"][item]),
            position=token - start + int(self.columns["item_start"][item]),
            tokens=self.texts(first, last, item),
            values=values.tolist(),
            peak=token - first,
            value=value,
            item=item,
        )

    def entries(self, kind: str, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens and values of a feature's ``top`` contexts or of its ``sample``."""
        a, b = self.columns[f"{kind}_offsets"][feature : feature + 2]
        return self.columns[f"{kind}_token"][a:b], self.columns[f"{kind}_value"][a:b]

    def pairs(self, name: str, number: str, feature: int) -> builtins.list[tuple[int, float]]:
        """The filled places of two tables side by side; none where the store has no such tables."""
        if name not in self.manifest["columns"]:
            return []
        return [
            (i, v)
            for i, v in zip(self.columns[name][feature].tolist(), self.columns[number][feature].tolist())
            if i >= 0
        ]

    def logits(self, sign: str, feature: int) -> builtins.list[tuple[str, float]]:
        found = self.pairs(f"{sign}_logit_token", f"{sign}_logit_value", feature)
        return [(self.label(token), value) for token, value in found]
