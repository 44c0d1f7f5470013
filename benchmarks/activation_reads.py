"""How fast rows come from a store: the stream, and the shuffle ring over it, with and without the reading thread.

    OMP_NUM_THREADS=2 python benchmarks/activation_reads.py                  # a drawn store, d = 576, bfloat16 and int8
    OMP_NUM_THREADS=2 python benchmarks/activation_reads.py activations --rounds 20
    OMP_NUM_THREADS=2 python benchmarks/activation_reads.py activations --step-ms 20

Prints the best of the rounds, in million rows a second, variants interleaved. ``--step-ms`` works on something else for
so long after each batch, as a training step would, and then prints how long the ring kept it waiting (milliseconds a
batch, median). Where the shards fit into memory this is the warm figure; drop the page cache before for the cold one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from unweave.activations import ActivationStore, RowStream, ShuffleRing, harvest
from unweave.sources import ArraySource

BATCHES = 40


def drawn_stores(folder: Path, n: int, d: int) -> dict[str, ActivationStore]:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    source = ArraySource(rows)
    return {
        "bfloat16": harvest(source, folder / "plain", n_rows=n),
        "int8": harvest(source, folder / "int8", n_rows=n, dtype="int8"),
    }


def stream_rate(stream: RowStream, batch: int) -> float:
    started = time.perf_counter()
    for _ in range(BATCHES):
        stream.read_parts(batch)
    return BATCHES * batch / (time.perf_counter() - started) / 1e6


def ring_rate(ring: ShuffleRing) -> float:
    started = time.perf_counter()
    for _ in range(BATCHES):
        ring.next()
    return BATCHES * ring.batch_size / (time.perf_counter() - started) / 1e6


def ring_wait(ring: ShuffleRing, step_s: float) -> float:
    weights, waits = torch.randn(512, 512), []
    for _ in range(BATCHES):
        started = time.perf_counter()
        ring.next()
        ready = time.perf_counter()
        waits.append(ready - started)
        while time.perf_counter() - ready < step_s:
            weights @ weights
    return statistics.median(waits) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--step-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.store is None:
            stores = drawn_stores(Path(folder), arguments.rows, arguments.width)
        else:
            store = ActivationStore.open(arguments.store)
            stores = {store.manifest.dtype: store}
        measured: dict[str, list[float]] = {}
        streams, rings = {}, {}
        for (kind, store), ahead in itertools.product(stores.items(), (False, True)):
            name = f"{kind}, {'read ahead' if ahead else 'read when asked'}"
            streams[f"stream, {name}"] = RowStream(store, read_ahead=ahead)
            for capacity in (65_536, 262_144):
                stream = RowStream(store, read_ahead=ahead)
                rings[f"ring of {capacity:,}, {name}"] = ShuffleRing(stream, arguments.batch, capacity)
        for _ in range(arguments.rounds):
            if arguments.step_ms:
                for name, ring in rings.items():
                    measured.setdefault(name, []).append(-ring_wait(ring, arguments.step_ms / 1e3))
                continue
            for name, stream in streams.items():
                measured.setdefault(name, []).append(stream_rate(stream, arguments.batch))
            for name, ring in rings.items():
                measured.setdefault(name, []).append(ring_rate(ring))
        unit = "ms waited a batch" if arguments.step_ms else "M rows/s"
        print(f"{torch.get_num_threads()} threads, batches of {arguments.batch:,} rows, {unit}")
        for name, values in measured.items():
            print(f"{name:<48} {abs(max(values)):6.2f}")


if __name__ == "__main__":
    main()
