"""Several data sets as one, and data without its near copies."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from unweave.errors import UnweaveError
from unweave.sources.chats import turns
from unweave.sources.documents import Documents

# A word, for n-grams: a run of anything but white space, or one character of a script that puts none between words.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that every word of an n-gram counts in full


class MixedDocuments(Documents):
    """Several data sets, interleaved so that at any point each has given its share of the text.

    Next comes a document of the data set that is furthest behind its share, counted in characters, since rows are what
    a dictionary learns from, and documents differ in length by much more than texts do in characters a token. A data
    set that has ended is left out and the others go on in their proportions, so a pass gives every document once. The
    order depends on the data sets, the weights and their order alone.

    Args:
        parts: the data sets, each in the order of its own seed. weights: of each, above 0; only their ratios matter.
        limit: the most documents to give. seed: for the batches of a source that reads this.

    Raises:
        UnweaveError: for no data sets, a weight of 0 or below, or texts together with dialogues.
    """

    def __init__(
        self, parts: Sequence[Documents], weights: Sequence[float], *, seed: int = 0, limit: int | None = None
    ) -> None:
        if not parts or len(parts) != len(weights):
            raise UnweaveError(f"a mix needs a weight for each data set, found {len(parts)} and {len(weights)} weights")
        if not all(0 < weight < float("inf") for weight in weights):
            raise UnweaveError(f"a mix needs weights above 0, found {', '.join(f'{w:g}' for w in weights)}")
        formats = {part.format for part in parts}
        if len(formats) > 1:
            raise UnweaveError("a mix is of texts or of dialogues, not of both: one model run reads them differently")
        shares = ", ".join(f"{part.spec}={weight:g}" for part, weight in zip(parts, weights))
        super().__init__(shares, seed, limit, formats.pop())
        self.parts, self.weights = list(parts), [float(weight) for weight in weights]

    def __iter__(self) -> Iterator[str]:
        waiting = {i: iter(part) for i, part in enumerate(self.parts)}
        given = [0.0] * len(self.parts)  # characters over weight: equal for all where each has its share
        n = 0
        while waiting and n != self.limit:
            i = min(waiting, key=given.__getitem__)
            text = next(waiting[i], None)
            if text is None:
                del waiting[i]
                continue
            given[i] += len(text) / self.weights[i]
            n += 1
            yield text

    def describe(self) -> str:
        total = sum(self.weights)
        parts = [f"{weight / total:.0%} {part.describe()}" for part, weight in zip(self.parts, self.weights)]
        return "a mix of " + "; ".join(parts)

    def fingerprint(self) -> str:
        facts = [f"{part.fingerprint()} {part.seed} {part.limit} {w!r}" for part, w in zip(self.parts, self.weights)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()


class DistinctDocuments(Documents):
    """Documents less those that share ``n`` words in a row with an earlier one that was kept.

    As FAST (Li et al. 2025) cleans its dialogues: documents pass by in their order; if any n-gram of one was seen, it
    is dropped, else its n-grams are remembered. N-grams do not reach from one turn of a dialogue into the next; a
    document of fewer words than ``n`` has none and is kept. What is a word the paper does not say: here, what stands
    between white space, and each Chinese or Japanese character.

    It costs some 8 to 16 bytes of memory for every word kept, while a pass goes on. What a whole pass dropped is
    remembered, so later ones cost nothing.

    Args:
        documents: where they come from. n: words in an n-gram. limit: the most documents to give.

    Raises:
        UnweaveError: for ``n`` below 1.
    """

    def __init__(self, documents: Documents, n: int = 20, *, limit: int | None = None) -> None:
        if n < 1:
            raise UnweaveError(f"dedup: expected n-grams of at least 1 word, found {n}")
        super().__init__(documents.spec, documents.seed, limit, documents.format)
        self.documents, self.n = documents, n
        self._dropped: frozenset[int] | None = None  # places, once a pass has come to its end

    def __iter__(self) -> Iterator[str]:
        return islice(self._distinct() if self._dropped is None else self._kept(self._dropped), self.limit)

    def _kept(self, dropped: frozenset[int]) -> Iterator[str]:
        return (text for place, text in enumerate(self.documents) if place not in dropped)

    def _distinct(self) -> Iterator[str]:
        seen, hashes, dropped = _Seen(), _WordHashes(), []
        for place, text in enumerate(self.documents):
            parts = [turn["content"] for turn in turns(text)] if self.format == "chat" else [text]
            grams = np.unique(np.concatenate([hashes.ngrams(part, self.n) for part in parts]))
            if seen.any_of(grams):
                dropped.append(place)
            else:
                seen.add(grams)
                yield text
        self._dropped = frozenset(dropped)

    def describe(self) -> str:
        left = "" if self._dropped is None else f" ({len(self._dropped):,} left out)"
        return f"{self.documents.describe()}, none sharing {self.n} words in a row with an earlier one{left}"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.documents.fingerprint()} distinct {self.n}".encode()).hexdigest()


class _WordHashes:
    """64-bit hashes of n-grams of words, the same in every process."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def ngrams(self, text: str, n: int) -> np.ndarray:
        """``(words - n + 1,)`` uint64, none for fewer words."""
        words = _WORD.findall(text)
        if len(words) < n:
            return np.empty(0, dtype=np.uint64)
        each = np.array([self._of(word) for word in words], dtype=np.uint64)
        total = np.zeros(len(words) - n + 1, dtype=np.uint64)
        for i in range(n):  # a polynomial in the base, modulo 2^64
            total = total * _BASE + each[i : i + len(total)]
        return total

    def _of(self, word: str) -> int:
        if (known := self._known.get(word)) is None:
            known = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
            if len(self._known) < 1_000_000:
                self._known[word] = known
        return known


class _Seen:
    """A growing set of 64-bit numbers: sorted runs, each at least twice as long as the next, merged as they grow.

    Eight bytes a number, where Python's own set takes some eighty.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def any_of(self, numbers: np.ndarray) -> bool:
        for run in self._runs:
            at = np.searchsorted(run, numbers)
            inside = at < len(run)
            if np.any(run[at[inside]] == numbers[inside]):
                return True
        return False

    def add(self, numbers: np.ndarray) -> None:
        """Add sorted numbers, none of them here yet."""
        if len(numbers) == 0:
            return
        self._runs.append(numbers)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            merged = np.concatenate([self._runs.pop(), last])
            merged.sort(kind="stable")  # two sorted runs: merged in one pass
            self._runs.append(merged)
