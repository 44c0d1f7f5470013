"""Which engine should answer the questions of a feature browser? Columns and numpy, Arrow, or DuckDB.

    python benchmarks/feature_store_engine.py --features 100000

Builds one synthetic FeatureStore, writes its feature table for each engine, asks all of them the same questions,
checks that the answers agree, and prints the median time of each. DuckDB is no dependency of unweave: install it
to run this (`pip install duckdb`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from feature_store_build import DrawnCodes, synthetic_vocabulary, text_batches, zipf_codes

from unweave.features import FeatureStore, IndexConfig, build_features

SCALARS = ("n_firing", "n_items", "maximum")
RAGGED = ("top", "sample")
HISTOGRAM = ("histogram_bin", "histogram_count")
FIXED = ("cofiring_feature", "top_tokens", "positive_logit_token", "negative_logit_token")


def synthetic_store(folder: Path, n_features: int, rows: int) -> FeatureStore:
    vocabulary, d = 20_000, 64
    dictionary = DrawnCodes(n_features, d, zipf_codes(rows, n_features, 32))
    output = torch.randn(d, vocabulary, generator=torch.Generator().manual_seed(1))
    return build_features(
        folder,
        dictionary,
        text_batches(rows, vocabulary),
        token_bytes=synthetic_vocabulary(vocabulary),
        unembed=lambda directions: directions @ output,
        config=IndexConfig(n_similar=0),  # quadratic, and no question below asks for it
        n_rows=rows,
    )


def feature_table(store: FeatureStore) -> pa.Table:
    """The same feature-level data as one Arrow table, lists as list columns."""
    c = store.columns
    data: dict[str, Any] = {"index": pa.array(np.arange(len(store), dtype="i4")), "density": store.table["density"]}
    data |= {name: c[name] for name in SCALARS}
    starts, text = c["search_offsets"], c["search_text"]
    data["text"] = pa.LargeStringArray.from_buffers(len(store), pa.py_buffer(starts), pa.py_buffer(text.tobytes()))
    for name in RAGGED:
        offsets = pa.array(c[f"{name}_offsets"])
        for part in ("token", "value"):
            data[f"{name}_{part}"] = pa.LargeListArray.from_arrays(offsets, pa.array(c[f"{name}_{part}"]))
    for name in HISTOGRAM:
        data[name] = pa.LargeListArray.from_arrays(pa.array(c["histogram_offsets"]), pa.array(c[name]))
    for name in FIXED:
        offsets = pa.array(np.arange(len(store) + 1, dtype="i8") * c[name].shape[1])
        data[name] = pa.LargeListArray.from_arrays(offsets, pa.array(c[name].reshape(-1)))
    return pa.table(data)


class Ours:
    name = "columns + numpy"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, table: pa.Table) -> None:
        pass  # the store itself

    def open(self) -> None:
        self.store = FeatureStore.open(self.folder / "features")

    def page(self, sort: str, low: float, search: str | None) -> list[int]:
        sort = {"maximum": "max_value"}.get(sort, sort)
        return self.store.ranked(sort=sort, min_density=low, search=search)[:50].tolist()

    def feature(self, index: int) -> int:
        c = self.store.columns
        read = [np.array(c[name][index]) for name in (*SCALARS, *FIXED)]
        read += [np.array(part) for kind in RAGGED for part in self.store.entries(kind, index)]
        a, b = c["histogram_offsets"][index : index + 2]
        return _total(read + [np.array(c[name][a:b]) for name in HISTOGRAM])


class Arrow:
    name = "Arrow IPC, memory-mapped"

    def __init__(self, folder: Path) -> None:
        self.file = folder / "table.arrow"

    def prepare(self, table: pa.Table) -> None:
        with pa.OSFile(str(self.file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    def open(self) -> None:
        self.table = pa.ipc.open_file(pa.memory_map(str(self.file))).read_all()

    def page(self, sort: str, low: float, search: str | None) -> list[int]:
        keep = pc.greater_equal(self.table["density"], low)
        if search:
            keep = pc.and_(keep, pc.match_substring(self.table["text"], search))
        small = self.table.select(["index", sort]).filter(keep)
        order = pc.sort_indices(small, [(sort, "descending"), ("index", "ascending")])
        return small["index"].take(order[:50]).to_pylist()

    def feature(self, index: int) -> int:
        return _total_of_row(self.table.slice(index, 1))


class DuckDB:
    name = "DuckDB, native file"

    def __init__(self, folder: Path) -> None:
        self.file = folder / "table.duckdb"

    def prepare(self, table: pa.Table) -> None:
        import duckdb

        connection = duckdb.connect(str(self.file))
        connection.register("arrow_table", table)
        connection.execute("create table features as select * from arrow_table")
        connection.close()

    connection: Any = None

    def open(self) -> None:
        import duckdb

        if self.connection is not None:
            self.connection.close()  # or the process would go on using the open database
        self.connection = duckdb.connect(str(self.file), read_only=True)
        self.source = "features"

    def page(self, sort: str, low: float, search: str | None) -> list[int]:
        where, values = "density >= ?", [low]
        if search:
            where, values = where + " and contains(text, ?)", [low, search]
        query = f'select "index" from {self.source} where {where} order by {sort} desc, "index" limit 50'
        return [row[0] for row in self.connection.execute(query, values).fetchall()]

    def feature(self, index: int) -> int:
        row = self.connection.sql(f'select * from {self.source} where "index" = {index}').to_arrow_table()
        return _total_of_row(row)


class DuckDBParquet(DuckDB):
    name = "DuckDB over Parquet"

    def __init__(self, folder: Path) -> None:
        self.file = folder / "table.parquet"

    def prepare(self, table: pa.Table) -> None:
        pq.write_table(table, self.file)

    def open(self) -> None:
        import duckdb

        self.connection = duckdb.connect()
        self.source = f"read_parquet('{self.file}')"


def _total(read: list[np.ndarray]) -> int:
    """One number out of all that was read, to compare the engines by."""
    return sum(int(array.astype("f8").sum()) for array in read)


def _total_of_row(row: pa.Table) -> int:
    scalars = [np.array(row[name][0].as_py()) for name in SCALARS]
    lists = [*FIXED, *HISTOGRAM, *(f"{kind}_{part}" for kind in RAGGED for part in ("token", "value"))]
    return _total(scalars + [row[name].combine_chunks().flatten().to_numpy() for name in lists])


def median_ms(call: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def import_ms(module: str) -> float:
    """Import time in a fresh process that has numpy already, as unweave does."""
    code = f"import numpy, time; t = time.perf_counter(); import {module}; print(1000 * (time.perf_counter() - t))"
    return statistics.median(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=60_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = synthetic_store(folder / "features", options.features, options.rows)
        table = feature_table(store)
        line = store.columns["search_text"][: store.columns["search_offsets"][1]].tobytes().decode().split()
        questions = {
            "open": None,
            "page by density": ("density", 0.0, None),
            "page by maximum, density >= 1e-4": ("maximum", 1e-4, None),
            "search, a word": ("density", 0.0, line[0]),
            "search, one letter": ("density", 0.0, "e"),
            "search, nothing found": ("density", 0.0, "zzzzq"),
            "read one feature": None,
        }
        engines = [Ours(folder), Arrow(folder), DuckDB(folder), DuckDBParquet(folder)]
        print(f"{options.features:,} features, {os.cpu_count()} CPUs, median of 7, milliseconds\n")
        print(f"{'':34}" + "".join(f"{engine.name:>26}" for engine in engines))
        imports = [0.0, import_ms("pyarrow, pyarrow.compute"), *[import_ms("duckdb")] * 2]
        print(f"{'import (once per process)':34}" + "".join(f"{ms:26.1f}" for ms in imports))
        for engine in engines:
            engine.prepare(table)
            engine.open()
        picks = np.random.default_rng(0).integers(0, options.features, 20).tolist()
        for question, values in questions.items():
            if question == "open":
                calls = [engine.open for engine in engines]
            elif values is None:
                calls = [lambda e=engine: [e.feature(i) for i in picks] for engine in engines]
            else:
                calls = [lambda e=engine, v=values: e.page(*v) for engine in engines]
            answers = [None] * len(calls) if question == "open" else [call() for call in calls]
            assert all(answer == answers[0] for answer in answers), f"{question}: the engines disagree"
            per_call = len(picks) if question == "read one feature" else 1
            print(f"{question:34}" + "".join(f"{median_ms(call) / per_call:26.2f}" for call in calls))
        print()
        for search in (None, "e"):
            ms = median_ms(lambda text=search: store.list(search=text))
            print(f"FeatureStore.list(search={search!r}), with the contexts of its 50 rows: {ms:.1f} ms")
        for file in ("table.arrow", "table.duckdb", "table.parquet"):
            print(f"{file}: {(folder / file).stat().st_size / 2**20:.0f} MiB", end="; ")
        print(
            f"store's feature columns: {sum(store.columns[n].nbytes for n in _feature_columns(store)) / 2**20:.0f} MiB"
        )


def _feature_columns(store: FeatureStore) -> list[str]:
    per_token = {"tokens", "has_row", "item_offsets", "item_document", "item_start", "vocabulary", "vocabulary_offsets"}
    return [n for n in store.manifest["columns"] if n not in per_token and not n.startswith("code_")]


if __name__ == "__main__":
    main()
