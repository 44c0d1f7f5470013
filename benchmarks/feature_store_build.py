"""How fast a FeatureStore is built, apart from encoding: random codes with Zipf densities.

    python benchmarks/feature_store_build.py --rows 400000 --features 4608 --k 32

Prints rows per second and the peak resident memory. The codes are drawn before the clock starts.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from unweave.batch import ActivationBatch, Items
from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary, DictionaryConfig
from unweave.features import FeatureStore, build_features


class DrawnCodes(Dictionary):
    """A dictionary whose codes were drawn beforehand: input row ``i`` holds the number of its code."""

    name = "drawn_codes"
    Config = DictionaryConfig

    def __init__(self, n_features: int, d: int, codes: SparseCode, seed: int = 0) -> None:
        super().__init__(DictionaryConfig(d_in=1, d_out=d, n_features=n_features))
        generator = torch.Generator().manual_seed(seed)
        self.atoms = nn.Parameter(torch.randn(n_features, d, generator=generator))
        self.codes = codes

    def encode(self, x: Tensor) -> SparseCode:
        first = int(x[0, 0])
        return self.codes[first : first + len(x)]

    def decoder_directions(self) -> Tensor:
        return self.atoms


def zipf_codes(rows: int, n_features: int, k: int, seed: int = 0) -> SparseCode:
    """About ``k`` features a row, feature ``f`` drawn in proportion to ``1 / (f + 50)``, lognormal values."""
    rng = np.random.default_rng(seed)
    weight = 1 / (np.arange(n_features) + 50.0)
    bounds = np.cumsum(weight / weight.sum())
    parts = []
    for a in range(0, rows, 20_000):
        n = min(20_000, rows - a)
        features = np.sort(np.searchsorted(bounds, rng.random((n, k))).clip(max=n_features - 1), axis=1)
        once = np.ones((n, k), bool)
        once[:, 1:] = features[:, 1:] != features[:, :-1]
        counts = torch.from_numpy(once.sum(1))
        values = torch.from_numpy(rng.lognormal(0, 0.7, int(once.sum())).astype("f4"))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        parts.append(SparseCode(torch.from_numpy(features[once]), values, offsets, n_features))
    return SparseCode.concatenate(parts)


def text_batches(rows: int, vocabulary: int, item: int = 128, items_per_batch: int = 16, seed: int = 0):
    """Items of ``item`` tokens; every token has a row, whose one number says which code is its."""
    rng = np.random.default_rng(seed)
    for a in range(0, rows, item * items_per_batch):
        n = min(item * items_per_batch, rows - a)
        bounds = [*range(0, n, item), n]
        tokens = torch.from_numpy((rng.pareto(1.0, n) * 20).astype("i8").clip(max=vocabulary - 1)).int()
        n_items = len(bounds) - 1
        document = torch.arange(a // item, a // item + n_items)
        items = Items(tokens, torch.tensor(bounds), document, torch.zeros(n_items, dtype=torch.int32))
        numbers = torch.arange(a, a + n, dtype=torch.float64)[:, None]
        batch = ActivationBatch(numbers, numbers, items, torch.arange(n))
        yield batch


def synthetic_vocabulary(n: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwyp"))
    return [(" " + "".join(rng.choice(letters, rng.integers(2, 8)))).encode() for _ in range(n)]


def build(folder: Path, rows: int, n_features: int, k: int, vocabulary: int = 20_000, d: int = 64) -> FeatureStore:
    dictionary = DrawnCodes(n_features, d, zipf_codes(rows, n_features, k))
    output = torch.randn(d, vocabulary, generator=torch.Generator().manual_seed(1))
    return timed_build(folder, dictionary, rows, vocabulary, lambda directions: directions @ output)


def timed_build(folder: Path, dictionary: DrawnCodes, rows: int, vocabulary: int, unembed) -> FeatureStore:
    words = synthetic_vocabulary(vocabulary)
    batches = list(text_batches(rows, vocabulary))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    store = build_features(folder, dictionary, batches, token_bytes=words, unembed=unembed)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    print(
        f"built {rows:,} rows x {dictionary.n_features:,} features in {seconds:.1f} s ({rows / seconds:,.0f} rows/s); "
        f"store {size:,.0f} MiB; peak memory {after:,.0f} MiB, {after - before:,.0f} MiB above the peak before"
    )
    return store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.profile:
            profile = cProfile.Profile()
            profile.enable()
        build(Path(folder) / "features", options.rows, options.features, options.k)
        if options.profile:
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
