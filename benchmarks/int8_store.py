"""What int8 rows cost: disk per row, and what a store and a dictionary lose by them.

    python benchmarks/int8_store.py                                      # drawn rows with a few large channels
    python benchmarks/int8_store.py activations --dictionary run/dictionary --rows 600k
    python benchmarks/int8_store.py activations --json int8.json

Copies the first rows of the store into a temporary folder twice, as they are and as int8, then reads both. The store
itself is only read. FVU is the share of the variance of the rows that is lost; "row scale only" is what a scale per row
would lose without the scale per channel. The dictionary is measured on its own rows, on the int8 rows, and (what
matters to somebody who trains on int8) with the rows it never saw as what it has to reconstruct.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.activations import ActivationStore, harvest
from unweave.dictionaries import Dictionary
from unweave.metrics import ReconstructionSums
from unweave.sources import ArraySource

CHUNK = 4096


def drawn_rows(n: int, d: int = 576) -> Tensor:
    """Gaussian rows with three channels of large mean, as residual streams have them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n, d, generator=generator)
    rows[:, :3] = rows[:, :3] * 10 + torch.tensor([60.0, -60.0, 20.0])
    return rows.bfloat16()


def pieces(store: ActivationStore, n: int) -> Iterator[slice]:
    for first in range(0, n, CHUNK):
        yield slice(first, min(first + CHUNK, n))


def row_scale_only(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (rows / scale).round() * scale


@torch.no_grad()
def measure(plain: ActivationStore, small: ActivationStore, dictionary: Dictionary | None) -> dict[str, Any]:
    n, d = plain.n_rows, plain.d_in
    assert small.n_rows == n
    sums = {name: ReconstructionSums(d) for name in ("int8", "row scale only")}
    if dictionary is not None:
        sums |= {name: ReconstructionSums(d) for name in ("on its rows", "on int8 rows", "from int8 rows to its rows")}
    l0 = dict.fromkeys(("on its rows", "on int8 rows"), 0.0)
    errors, kept = [], 0.0
    for piece in pieces(plain, n):
        x, y = plain.rows(piece).float(), small.rows(piece).float()
        sums["int8"].add(x, y)
        sums["row scale only"].add(x, row_scale_only(x))
        errors.append((x - y).norm(dim=1) / x.norm(dim=1).clamp(min=1e-30))
        if dictionary is not None:
            codes = dictionary.encode(x), dictionary.encode(y)
            hats = [dictionary.decode(code) for code in codes]
            sums["on its rows"].add(x, hats[0])
            sums["on int8 rows"].add(y, hats[1])
            sums["from int8 rows to its rows"].add(x, hats[1])
            for name, code in zip(l0, codes, strict=True):
                l0[name] += code.indices.numel() / n
            kept += shared(*codes) * len(x) / n
    error = torch.cat(errors)
    found: dict[str, Any] = {
        "rows": n,
        "width": d,
        "dtype": str(plain.dtype).removeprefix("torch."),
        "bytes_per_row": {"plain": plain.bytes / n, "int8": small.bytes / n},
        "fvu": {name: sums[name].values()["fvu"] for name in ("int8", "row scale only")},
        "relative_error_of_a_row": {
            "median": float(error.median()),
            "p99": float(error.sort().values[int(0.99 * n)]),
            "largest": float(error.max()),
        },
    }
    if dictionary is not None:
        found["dictionary_fvu"] = {name: s.values()["fvu"] for name, s in sums.items() if "rows" in name}
        found["dictionary_l0"] = l0
        found["features_in_common"] = kept
    return found


def shared(a: Any, b: Any) -> float:
    """The mean share of the features that fire on a row which also fire on its int8 copy."""
    there = a.dense() != 0
    return float(((b.dense() != 0) & there).sum(1).div(there.sum(1).clamp(min=1)).mean())


def reading_speed(store: ActivationStore) -> float:
    """Rows a second in slices of 256, from memory (the best of three passes)."""
    best = 0.0
    for _ in range(3):
        started, n = time.perf_counter(), 0
        for i, size in enumerate(store.shard_sizes):
            reader = store.shard(i)
            for first in range(0, size, 256):
                n += len(reader.input(slice(first, min(first + 256, size))).clone())
        best = max(best, n / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("--dictionary", type=Path)
    parser.add_argument("--rows", default="100k")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    n = int(float(arguments.rows.replace("k", "e3").replace("M", "e6")))
    source: Any = ArraySource(drawn_rows(n)) if arguments.store is None else ActivationStore.open(arguments.store)
    if arguments.store is not None:
        n = min(n, source.n_rows)
    dictionary = Dictionary.load(arguments.dictionary) if arguments.dictionary else None
    with tempfile.TemporaryDirectory() as folder:
        plain = harvest(source, Path(folder) / "plain", n_rows=n)
        started = time.perf_counter()
        small = harvest(source, Path(folder) / "int8", n_rows=n, dtype="int8")
        seconds = time.perf_counter() - started
        found = measure(plain, small, dictionary)
        found["rows_per_s"] = {
            "write int8": small.n_rows / seconds,
            "read plain": reading_speed(plain),
            "read int8": reading_speed(small),
        }
    for name, value in found.items():
        shown = value if isinstance(value, dict) else {"": value}
        for key, number in shown.items():
            text = f"{number:,.5g}" if isinstance(number, float) else str(number)
            print(f"{f'{name} {key}'.strip():<48} {text:>14}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
