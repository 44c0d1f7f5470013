"""What is counted of every feature while codes stream by. Two tallies merge into exactly the tally of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unweave.features._best import BestPerFeature, Entries

N_BINS = 256
_NOTHING = -1000  # the exponent of a feature without a value yet


@dataclass(frozen=True)
class Block:
    """Codes of some whole items, all tokens included.

    ``feature[e], value[e]`` for the entries ``offsets[t]:offsets[t + 1]`` of token ``t``; ``item_offsets`` says
    which tokens form an item, ``key`` where each token is (:func:`token_keys`), ``first`` which token of the store
    token 0 is.
    """

    feature: np.ndarray  # (nnz,) int32
    value: np.ndarray  # (nnz,) float32, no zeros
    offsets: np.ndarray  # (n_tokens + 1,) int64
    item_offsets: np.ndarray  # (n_items + 1,) int64
    key: np.ndarray  # (n_tokens,) int64
    first: int


def token_keys(item_offsets: np.ndarray, document: np.ndarray, start: np.ndarray) -> np.ndarray:
    """``(n_tokens,)`` int64: the document number and the position in it as one number that sorts like both.

    A BOS put before an item stands at the position of the token before the item (or at -1); the last bit tells
    the two apart.
    """
    lengths = np.diff(item_offsets)
    within = np.arange(item_offsets[-1]) - np.repeat(item_offsets[:-1], lengths)
    position = np.repeat(start, lengths).astype("i8") + within + 1
    return (np.repeat(document, lengths).astype("i8") << 32) + 2 * position + (within > 0)


def hash_keys(key: np.ndarray, seed: int) -> np.ndarray:
    """``(n,)`` uint64, a well-mixed hash of each key (the finaliser of splitmix64)."""
    mixed = key.astype("u8") + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def magnitude_rank(value: np.ndarray) -> np.ndarray:
    """``(n,)`` uint64, smaller for larger ``|value|``: the bits of a positive float sort like the float."""
    bits = np.abs(value.astype("f4")).view("u4")
    return (np.uint32(2**32 - 1) - bits).astype("u8")


class Tally:
    """Counts, histogram, top contexts and sample of each feature.

    The histogram has ``N_BINS`` equal bins of ``|value|`` from 0 to ``2 ** exponent``, the smallest power of two
    above the feature's maximum. When the maximum outgrows it, neighbouring bins are added in pairs. Halving a bin
    number is what doubling the range does to it, so the result does not depend on the order of the data.

    The sample is a bottom-k sketch: the firings whose position has the smallest hash. It is uniform over firings,
    needs no random numbers, and the samples of two parts merge into the sample of the whole.
    """

    def __init__(self, n_features: int, n_top: int, n_sample: int, seed: int) -> None:
        self.n_features, self.seed = n_features, seed
        self.n_firing = np.zeros(n_features, "i8")
        self.n_negative = np.zeros(n_features, "i8")
        self.n_items = np.zeros(n_features, "i8")
        self.total = np.zeros(n_features, "f8")  # sum of |value|
        self.maximum = np.zeros(n_features, "f4")  # of |value|
        self.exponent = np.full(n_features, _NOTHING, "i4")
        self.histogram = np.zeros((n_features, N_BINS), "u4")
        self.top = BestPerFeature(n_features, n_top)
        self.sample = BestPerFeature(n_features, n_sample)

    def add(self, block: Block) -> None:
        if len(block.feature) == 0:
            return
        feature, value, token = _by_feature(block, self.n_features)
        size = np.abs(value)
        self.n_firing += np.bincount(feature, minlength=self.n_features)
        self.n_negative += np.bincount(feature[value < 0], minlength=self.n_features)
        self.total += np.bincount(feature, weights=size, minlength=self.n_features)
        self._count_values(feature, size)
        self._keep_peaks(block, feature, value, size, token)
        rank = hash_keys(block.key, self.seed)[token]
        self.sample.add(Entries(feature, rank, block.key[token], token + block.first, value))

    def _keep_peaks(
        self, block: Block, feature: np.ndarray, value: np.ndarray, size: np.ndarray, token: np.ndarray
    ) -> None:
        """One candidate per feature and item: its largest ``|value|``, the first one if several are equal."""
        item = np.repeat(np.arange(len(block.item_offsets) - 1), np.diff(block.item_offsets))[token]
        new = np.ones(len(feature), bool)
        new[1:] = (feature[1:] != feature[:-1]) | (item[1:] != item[:-1])
        starts = np.flatnonzero(new)
        self.n_items += np.bincount(feature[starts], minlength=self.n_features)
        peaks = np.maximum.reduceat(size, starts)
        run = np.cumsum(new) - 1
        at_peak = np.flatnonzero(size == peaks[run])
        first = np.ones(len(at_peak), bool)
        first[1:] = run[at_peak[1:]] != run[at_peak[:-1]]
        at = at_peak[first]
        tokens = token[at]
        self.top.add(
            Entries(feature[at], magnitude_rank(value[at]), block.key[tokens], tokens + block.first, value[at])
        )

    def _count_values(self, feature: np.ndarray, size: np.ndarray) -> None:
        starts = np.flatnonzero(np.diff(feature, prepend=-1))
        maximum = np.zeros(self.n_features, "f4")
        maximum[feature[starts]] = np.maximum.reduceat(size, starts)
        self.maximum = np.maximum(self.maximum, maximum)
        self._grow(_exponent(self.maximum))
        scaled = np.ldexp(size.astype("f8"), 8 - self.exponent[feature])
        flat = feature.astype("i8") * N_BINS + scaled.astype("i8")
        np.add.at(self.histogram.reshape(-1), flat, np.uint32(1))

    def _grow(self, exponent: np.ndarray) -> None:
        """Widen the histograms whose exponent is smaller."""
        shift = np.where(self.exponent > _NOTHING, np.minimum(exponent - self.exponent, 8), 0)
        for step in np.unique(shift[shift > 0]):
            grown = np.flatnonzero(shift == step)
            width = 1 << int(step)
            merged = self.histogram[grown].reshape(len(grown), N_BINS // width, width).sum(axis=2, dtype="u4")
            self.histogram[grown] = 0
            self.histogram[grown, : N_BINS // width] = merged
        self.exponent = np.maximum(self.exponent, exponent).astype("i4")

    def merge(self, other: Tally, first: int) -> None:
        """Add the tally of other items, whose token 0 is token ``first`` of the joint store."""
        self.n_firing += other.n_firing
        self.n_negative += other.n_negative
        self.n_items += other.n_items
        self.total += other.total
        self.maximum = np.maximum(self.maximum, other.maximum)
        self._grow(other.exponent)
        other._grow(self.exponent)
        self.histogram += other.histogram
        for mine, theirs in ((self.top, other.top), (self.sample, other.sample)):
            entries = theirs.entries()
            mine.add(entries._replace(token=entries.token + first))

    # ---- columns ------------------------------------------------------------------------------------------------

    def columns(self) -> dict[str, np.ndarray]:
        """What is written to the store, and read back by :meth:`from_columns`."""
        out = {name: getattr(self, name) for name in _PLAIN}
        feature, filled = self.histogram.nonzero()  # most of a rare feature's bins are empty
        out["histogram_offsets"] = _offsets(np.bincount(feature, minlength=self.n_features))
        out["histogram_bin"] = filled.astype("u1")
        out["histogram_count"] = self.histogram[feature, filled]
        for name in ("top", "sample"):
            best: BestPerFeature = getattr(self, name)
            entries = best.entries()
            out |= {f"{name}_offsets": best.offsets(), f"{name}_token": entries.token, f"{name}_value": entries.value}
        return out

    @classmethod
    def from_columns(
        cls, columns: dict[str, np.ndarray], key: np.ndarray, n_top: int, n_sample: int, seed: int
    ) -> Tally:
        """``key``: ``(n_tokens,)`` of the store the columns come from."""
        tally = cls(len(columns["n_firing"]), n_top, n_sample, seed)
        for name in _PLAIN:
            setattr(tally, name, np.array(columns[name]))
        feature = np.repeat(np.arange(tally.n_features), np.diff(columns["histogram_offsets"]))
        tally.histogram[feature, columns["histogram_bin"]] = columns["histogram_count"]
        for name, best in (("top", tally.top), ("sample", tally.sample)):
            token, value = np.array(columns[f"{name}_token"]), np.array(columns[f"{name}_value"])
            counts = np.diff(columns[f"{name}_offsets"])
            feature = np.repeat(np.arange(len(counts), dtype="i4"), counts)
            rank = magnitude_rank(value) if name == "top" else hash_keys(key[token], seed)
            best.add(Entries(feature, rank, key[token], token, value))
        return tally


_PLAIN = ("n_firing", "n_negative", "n_items", "total", "maximum", "exponent")
COLUMNS = (
    *_PLAIN,
    *("histogram_offsets", "histogram_bin", "histogram_count"),
    *(f"{kind}_{what}" for kind in ("top", "sample") for what in ("offsets", "token", "value")),
)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()]).astype("i8")


def _exponent(maximum: np.ndarray) -> np.ndarray:
    """The smallest ``e`` with ``maximum < 2 ** e``; far below everything where there is no value yet."""
    exponent = np.frexp(maximum)[1].astype("i4")
    return np.where(maximum > 0, exponent, _NOTHING).astype("i4")


def _by_feature(block: Block, n_features: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entries sorted by feature, then token: ``(feature, value, token)``, through a counting sort."""
    import scipy.sparse

    shape = (len(block.offsets) - 1, n_features)
    matrix = scipy.sparse.csr_matrix((block.value, block.feature, block.offsets), shape=shape).tocsc()
    feature = np.repeat(np.arange(n_features, dtype="i4"), np.diff(matrix.indptr))
    return feature, matrix.data, matrix.indices.astype("i8")
