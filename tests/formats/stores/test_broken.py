"""Hostile and broken stores: each gives one clear error, and executes nothing."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from unweave.activations import harvest
from unweave.errors import UnweaveError
from unweave.formats import stores

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "saelens": "saelens/float32",
    "parquet": "saelens/parquet",
    "saev": "saev/one_layer",
    "llamascopium": "llamascopium/bfloat16/blocks.1.hook_resid_post",
    "pt": "llamascopium/pt/blocks.1.hook_resid_post",
    "delphi": "delphi/raw/layers.1",
}


def read(folder: Path, out: Path, format: str | None = None) -> Any:
    source = stores.open_store(folder, format=format)
    if isinstance(source, stores.Latents):
        return list(source.batches())
    assert isinstance(source, stores.ForeignRows)
    return harvest(source, out, n_rows=source.n_rows)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return do


def tensors(name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        values = load_file(folder / name)
        change(values)
        save_file(values, folder / name)

    return do


def set_at(key: str, place: Any, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda values: values[key].__setitem__(place, value)


def swapped(values: dict[str, np.ndarray]) -> None:
    values["locations"] = values["locations"][::-1].copy()


def ragged(folder: Path) -> None:
    path = folder / "data-00000-of-00003.arrow"
    with pa.ipc.open_stream(path) as stream:
        table = stream.read_all()
    column = table.column(0).to_pylist()
    column[1] = column[1][:-1]
    table = table.set_column(0, table.schema.names[0], pa.array(column, pa.list_(pa.list_(pa.float32()))))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def without_end(folder: Path) -> None:
    """Cut between two messages: what is left reads as a whole stream with fewer contexts."""
    path = folder / "data-00002-of-00003.arrow"
    path.write_bytes(path.read_bytes()[:-8])


BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("saelens", cut("data-00001-of-00003.arrow"), "00003.arrow does not end as an Arrow stream does: it is cut"),
    ("saelens", without_end, "cut short"),
    ("saelens", cut("data-00000-of-00003.arrow", 0), "00000-of-00003.arrow cannot be read"),
    ("saelens", lambda f: (f / "data-00001-of-00003.arrow").unlink(), "00001-of-00003.arrow is missing"),
    ("saelens", ragged, "expected every list to hold 6, found"),
    ("saelens", lambda f: edit(f / "state.json", _data_files=[{"filename": "../x.arrow"}]), "names of files beside it"),
    ("saelens", lambda f: edit(f / "state.json", _data_files=[]), "names no file"),
    ("saelens", lambda f: edit(f / "state.json", _indices_data_files=[{"filename": "i"}]), "flatten_indices"),
    ("saelens", lambda f: edit(f / "dataset_info.json", features={"h": {"_type": "Array2D", "shape": [6, 9],
               "dtype": "float32"}}), "expected a column 'h'"),
    ("saelens", lambda f: edit(f / "dataset_info.json", features={"blocks.1.hook_resid_post": {"_type": "Array2D",
               "shape": [6, 9], "dtype": "float32"}}), "expected every list to hold 9"),
    ("saelens", lambda f: edit(f / "dataset_info.json", features={"h": {"_type": "Array2D", "shape": [6, -9],
               "dtype": "float32"}}), "sensible shape"),
    ("saelens", lambda f: edit(f / "dataset_info.json", features={"h": {"_type": "Array2D", "shape": [6, 9],
               "dtype": "object"}}), "to hold floats, found 'object'"),
    ("parquet", cut("data/train-00000-of-00001.parquet", 0.9), "holds no dataset|cannot be read"),
    ("saev", cut("acts000001.bin"), "expected 672 bytes for 3 examples, found 336 bytes"),
    ("saev", lambda f: (f / "acts000001.bin").unlink(), "found 2 of 3 each"),
    ("saev", lambda f: (f / "acts000001.bin").rename(f / "acts000009.bin"), "found no file"),
    ("saev", lambda f: edit(f / "metadata.json", protocol="1.0.0"), "shards.json is missing"),
    ("saev", lambda f: edit(f / "metadata.json", protocol="3.0"), "a protocol up to 2"),
    ("saev", lambda f: edit(f / "metadata.json", dtype="float16"), "expected float32"),
    ("saev", lambda f: edit(f / "metadata.json", layers=[]), "numbers of layers"),
    ("saev", lambda f: edit(f / "metadata.json", d_vit=0), "1 or more, found 0"),
    ("saev", lambda f: edit(f / "metadata.json", d_vit=1 << 39), "sensible shape|expected .* bytes"),
    ("saev", lambda f: edit(f / "metadata.json", n_patches_per_shard=3), "not one example"),
    ("saev", lambda f: edit(f / "metadata.json", n_imgs=1 << 39), "found 3 of 3 each: copy the folder again"),
    ("saev", lambda f: edit(f / "metadata.json", n_imgs=9), "every value of example 7 is 0: nothing was written there"),
    ("saev", lambda f: np.full(168, np.nan, "f4").tofile(f / "acts000000.bin"), "NaN or infinity"),
    ("llamascopium", cut("chunk-00000001.safetensors"), "not a whole safetensors file"),
    ("llamascopium", lambda f: (f / "chunk-00000001.safetensors").unlink(), "chunk 1 of 3 is missing"),
    ("llamascopium", lambda f: shutil.copy(f / "chunk-00000001.safetensors", f / "shard-0-chunk-00000001.safetensors"),
     "a chunk twice"),
    ("pt", lambda f: (f / "chunk-00000001.pt").write_bytes(pickle.dumps({"a": 1})), "bare pickle"),
    ("delphi", cut("16_32.safetensors", 0.9), "not a whole safetensors file"),
    ("delphi", lambda f: (f / "33_49.safetensors").unlink(), "expected 3 START_END.safetensors, found 2"),
    ("delphi", lambda f: (f / "0_15.safetensors").rename(f / "1_16.safetensors"), "expected a split from latent 0"),
    ("delphi", tensors("0_15.safetensors", set_at("locations", (3, 0), 12)), "found .12, .* as entry 3"),
    ("delphi", tensors("0_15.safetensors", set_at("locations", (3, 1), 32)), "expected locations below"),
    ("delphi", tensors("0_15.safetensors", set_at("locations", (3, 2), 16)), "expected locations below"),
    ("delphi", tensors("0_15.safetensors", swapped), "in the order of contexts"),
    ("delphi", tensors("0_15.safetensors", lambda v: set_at("locations", 1, v["locations"][0])(v)), "stands twice"),
    ("delphi", tensors("0_15.safetensors", set_at("activations", 5, np.inf)), "NaN or infinity"),
    ("delphi", tensors("0_15.safetensors", set_at("tokens", (0, 0), -5)), "token ids from 0"),
    ("delphi", tensors("0_15.safetensors", lambda v: v.update(tokens=v["tokens"][:-1].copy())), "as in the others"),
    ("delphi", tensors("0_15.safetensors", lambda v: v.update(activations=v["activations"][1:].copy())), "floats .n,."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "damage", "words"), BROKEN, ids=[f"{i}-{case}" for i, (case, _, _) in enumerate(BROKEN)]
)
def test_what_is_broken_is_told(case: str, damage: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    folder = tmp_path / Path(CASES[case]).name
    shutil.copytree(GOLDEN / CASES[case], folder)
    read(folder, tmp_path / "whole")
    damage(folder)
    with pytest.raises(UnweaveError, match=words):
        read(folder, tmp_path / "store", format=CASES[case].split("/")[0])


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="no folder at"):
        stores.open_store(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UnweaveError, match=r"holds no store in a format .* found notes\.txt"):
        stores.open_store(tmp_path)
    with pytest.raises(UnweaveError, match=r"Stores lie below it: name one of raw/layers\.1"):
        stores.open_store(GOLDEN / "delphi")
    with pytest.raises(UnweaveError, match="no format 'saelenz' of stores"):
        stores.open_store(tmp_path, format="saelenz")
    with pytest.raises(UnweaveError, match=r"no option 'k'.*hook: which column"):
        stores.open_store(GOLDEN / "saelens" / "float32", k=3)
    with pytest.raises(UnweaveError, match=r"layers \[3, 11\]: say which, as layer="):
        stores.open_store(GOLDEN / "saev" / "two_layers")
    with pytest.raises(UnweaveError, match="holds no layer 4"):
        stores.open_store(GOLDEN / "saev" / "two_layers", layer=4)


def test_the_pickled_data_set_of_saev_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (tmp_path / "went off").mkdir, ()

    shutil.copytree(GOLDEN / "saev" / "one_layer", tmp_path / "shards")
    edit(tmp_path / "shards" / "metadata.json", data=pickle.dumps(Bomb()).hex())
    read(tmp_path / "shards", tmp_path / "store")
    assert not (tmp_path / "went off").exists()


def test_a_pickle_that_is_a_program_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (tmp_path / "went off").mkdir, ()

    folder = tmp_path / "blocks.1.hook_resid_post"
    shutil.copytree(GOLDEN / CASES["pt"], folder)
    with zipfile.ZipFile(folder / "chunk-00000002.pt", "w") as archive:
        archive.writestr("chunk/data.pkl", pickle.dumps({"activation": Bomb()}))
    with pytest.raises(UnweaveError, match="refused"):
        read(folder, tmp_path / "store", format="llamascopium")
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize("case", CASES)
def test_bytes_changed_at_random_end_in_one_error_or_a_clean_read(case: str, tmp_path: Path) -> None:
    rng = random.Random(case)
    whole = GOLDEN / CASES[case]
    names = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.name != "expected.safetensors"]
    refused = 0
    for i in range(60):
        folder = tmp_path / f"{i}" / whole.name
        shutil.copytree(whole, folder)
        path = folder / rng.choice(names)
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            read(folder, tmp_path / f"{i}" / "store", format=CASES[case].split("/")[0])
        except UnweaveError:
            refused += 1
    assert refused > 5
