"""Layouts of which no library was at hand, written by hand as their pages say; and what delphi's writer makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file, save_file

from unweave.activations import harvest
from unweave.batch import ActivationBatch, Items
from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.formats import stores

PROTOCOLS: dict[str, tuple[dict[str, Any], str]] = {
    "1.0.0": (
        {"vit_family": "clip", "vit_ckpt": "c", "n_patches_per_img": 3, "d_vit": 4, "n_imgs": 5, "dtype": "float32",
         "max_patches_per_shard": 16}, "n_imgs",
    ),
    "2.0": (
        {"family": "clip", "ckpt": "c", "patches_per_ex": 3, "d_model": 4, "n_ex": 5, "patches_per_shard": 16}, "n_ex",
    ),
    "2.1": (
        {"family": "clip", "ckpt": "c", "content_tokens_per_example": 3, "d_model": 4, "n_examples": 5,
         "max_tokens_per_shard": 16, "data": "gASVCgAAAAAAAACMBmRhbmdlcpQu", "dataset": "/pictures", "pixel_agg": None},
        "n_examples",
    ),
}  # fmt: skip


def saev_folder(folder: Path, protocol: str, cls_token: bool = False) -> np.ndarray:
    """Five examples of two layers in shards of two, and the values ``(5, 2, t, 4)``."""
    metadata, count = PROTOCOLS[protocol]
    t = 3 + cls_token
    folder.mkdir()
    values = np.random.default_rng(0).normal(size=(5, 2, t, 4)).astype("f4")
    budget = next(key for key in metadata if "per_shard" in key)
    metadata = {**metadata, budget: 4 * t + 1, "layers": [2, 7], "cls_token": cls_token, "protocol": protocol}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    shards = []
    for i, first in enumerate(range(0, 5, 2)):
        part = values[first : first + 2]
        full = np.zeros((2, 2, t, 4), "f4")  # the file has its length though one example is missing
        full[: len(part)] = part
        full.tofile(folder / f"acts{i:06d}.bin")
        shards.append({"name": f"acts{i:06d}.bin", count: len(part)})
    (folder / "shards.json").write_text(json.dumps(shards))
    return values


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("cls_token", [False, True])
def test_saev_of_every_protocol(protocol: str, cls_token: bool, tmp_path: Path) -> None:
    values = saev_folder(tmp_path / "shards", protocol, cls_token)
    source: Any = stores.open_store(tmp_path / "shards", layer=7)
    store = harvest(source, tmp_path / "store", n_rows=source.n_rows)
    assert store.provenance["data"]["protocol"] == protocol
    assert torch.equal(store.rows(slice(None)), torch.from_numpy(values[:, 1, cls_token:].reshape(-1, 4)))
    assert store.meta(slice(None)).document.tolist() == [i for i in range(5) for _ in range(3)]


def write_chunk(path: Path, n: int = 4, d: int = 4, **more: np.ndarray) -> dict[str, np.ndarray]:
    path.parent.mkdir(exist_ok=True)
    values = {"activation": np.random.default_rng(n).normal(size=(n, d)).astype("f4"), "tokens": np.arange(n)}
    save_file(values | more, path)
    return values | more


def test_llamascopium_s_flat_chunks_of_several_writers(tmp_path: Path) -> None:
    folder = tmp_path / "blocks.3.hook_mlp_out"
    parts = [write_chunk(folder / f"shard-{r}-chunk-{i:08d}.safetensors", 4 + r + i) for r in (0, 1) for i in (0, 1)]
    source: Any = stores.open_store(folder)
    assert (source.site, source.model, source.context_size) == ("layers.3.mlp", None, 1)
    store = harvest(source, tmp_path / "store", n_rows=100)
    assert np.array_equal(store.rows(slice(None)).numpy(), np.concatenate([p["activation"] for p in parts]))
    assert store.meta(slice(None)).token.tolist() == np.concatenate([p["tokens"] for p in parts]).tolist()


def arrow_folder(
    folder: Path, columns: dict[str, np.ndarray], *, contexts_a_piece: int = 3, fixed: bool = False
) -> None:
    """A ``datasets`` folder with one file, and nested lists as SAELens's columns lie."""
    folder.mkdir()
    arrays, features = {}, {}
    for name, values in columns.items():
        array: pa.Array = pa.array(values.ravel())
        for size in values.shape[:0:-1]:
            if fixed:
                array = pa.FixedSizeListArray.from_arrays(array, size)
            else:
                array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype="i4"), array)
        arrays[name] = array
        if values.ndim == 3:
            features[name] = {"shape": list(values.shape[1:]), "dtype": str(values.dtype), "_type": "Array2D"}
    table = pa.table(arrays)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as s:
        s.write_table(table, max_chunksize=contexts_a_piece)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


@pytest.mark.parametrize("fixed", [False, True])
def test_saelens_with_several_hooks_and_no_tokens(fixed: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {f"blocks.{i}.hook_resid_pre": rng.normal(size=(10, 5, 4)).astype("f4") for i in (1, 2)}
    arrow_folder(tmp_path / "cache", rows, fixed=fixed)
    with pytest.raises(UnweaveError, match=r"several sites: say which, with hook= one of blocks\.1"):
        stores.open_store(tmp_path / "cache")
    with pytest.raises(UnweaveError, match="holds no column"):
        stores.open_store(tmp_path / "cache", hook="blocks.9")
    source: Any = stores.open_store(tmp_path / "cache", hook="blocks.2.hook_resid_pre")
    assert source.site == "layers.2:input"
    assert source.provenance["unknown"] == ["model", "tokens"]
    store = harvest(source, tmp_path / "store", n_rows=source.n_rows)
    assert np.array_equal(store.rows(slice(None)).numpy(), rows["blocks.2.hook_resid_pre"].reshape(-1, 4))
    with pytest.raises(UnweaveError, match="holds no token ids: leave without"):
        stores.open_store(tmp_path / "cache", hook="blocks.1.hook_resid_pre", without=[0])


def test_saelens_pieces_do_not_hang_on_how_the_file_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unweave.formats.stores._base.BATCH_ROWS", 20)  # four contexts
    rng = np.random.default_rng(0)
    columns = {"blocks.1.hook_z": rng.normal(size=(23, 5, 4)).astype("f2"), "token_ids": np.arange(115).reshape(23, 5)}
    found = []
    for size in (1, 3, 4, 7, 23):
        arrow_folder(tmp_path / f"{size}", columns, contexts_a_piece=size)
        source: Any = stores.open_store(tmp_path / f"{size}", without=[0, 7])
        batches = list(source.batches())
        assert [len(batch.items) for batch in batches] == [4, 4, 4, 4, 4, 3]
        for skip in range(7):
            rest = list(source.batches(skip))
            assert [batch.n_rows for batch in rest] == [batch.n_rows for batch in batches[skip:]]
            if rest:
                assert torch.equal(rest[0].input, batches[skip].input)
                assert rest[0].items.document[0] == 4 * skip
        found.append(ActivationBatch.concatenate(batches))
    tokens = torch.arange(115)
    keep = (tokens != 0) & (tokens != 7)
    for whole in found:
        assert whole.meta.token.tolist() == tokens[keep].tolist()
        assert torch.equal(whole.input, torch.from_numpy(columns["blocks.1.hook_z"].reshape(-1, 4))[keep])
        assert whole.items.tokens.tolist() == tokens.tolist()


# ---- delphi's, written ---------------------------------------------------------------------------------------------


def coded(lengths: list[int], n_features: int = 11, seed: int = 0) -> tuple[ActivationBatch, SparseCode]:
    """Items of these lengths, every third token without a row, codes of either sign."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n = int(offsets[-1])
    tokens = torch.randint(0, 90, (n,), generator=generator, dtype=torch.int32)
    items = Items(tokens, offsets, torch.arange(len(lengths)), torch.zeros(len(lengths), dtype=torch.int32))
    row_token = torch.tensor([i for i in range(n) if i % 3])
    dense = torch.randn(len(row_token), n_features, generator=generator)
    dense = dense.half().float() * (torch.rand(dense.shape, generator=generator) < 0.3)
    rows = torch.empty(len(row_token), 0)
    return ActivationBatch(rows, rows, items, row_token), SparseCode.from_dense(dense)


def by_token(batch: ActivationBatch, code: SparseCode) -> torch.Tensor:
    dense = torch.zeros(batch.items.n_tokens, code.n_features)
    dense[batch.row_token] = code.dense()
    return dense


def test_latents_come_back_as_they_were_written(tmp_path: Path) -> None:
    parts = [coded([16] * 4), coded([16] * 3, seed=1)]
    folder = stores.write_latents(tmp_path / "raw" / "layers.5.mlp", iter(parts), 11, model="gpt2", n_splits=4)
    assert sorted(p.name for p in folder.iterdir()) == [
        "0_1.safetensors", "2_4.safetensors", "5_7.safetensors", "8_10.safetensors", "config.json",
    ]  # fmt: skip
    assert [p.name for p in (tmp_path / "raw").iterdir()] == [
        "layers.5.mlp"
    ]  # delphi takes every entry for a hookpoint
    latents: Any = stores.open_store(folder)
    assert (latents.model, latents.site, latents.context_size, latents.n_contexts) == ("gpt2", "layers.5.mlp", 16, 7)
    found = list(latents.batches())
    assert torch.equal(torch.cat([code.dense() for _, code in found]), torch.cat([by_token(*part) for part in parts]))
    tensors = load_file(folder / "2_4.safetensors")
    kinds = {name: (str(values.dtype), values.ndim) for name, values in tensors.items()}
    assert kinds == {"locations": ("uint16", 2), "activations": ("float16", 1), "tokens": ("int64", 2)}


def test_items_of_unequal_length_are_joined_and_cut(tmp_path: Path) -> None:
    batch, code = coded([5, 33, 2, 40])
    folder = stores.write_latents(tmp_path / "raw" / "layers.5", [(batch, code)], 11)
    latents: Any = stores.open_store(folder)
    assert (latents.context_size, latents.n_contexts) == (64, 1)  # of 80 tokens 16 fill no context
    ((there, dense),) = latents.batches()
    assert torch.equal(there.items.tokens, batch.items.tokens[:64])
    assert torch.equal(dense.dense(), by_token(batch, code)[:64])
    again: Any = stores.open_store(
        stores.write_latents(tmp_path / "raw" / "x", [(batch, code)], 11, context_size=8, n_splits=1)
    )
    assert (again.context_size, again.n_contexts, again.site) == (8, 10, None)


def test_latents_without_their_tokens(tmp_path: Path) -> None:
    batch, code = coded([8] * 5)
    folder = stores.write_latents(tmp_path / "raw" / "layers.5", [(batch, code)], 11, model="gpt2", n_splits=2)
    for path in folder.glob("*.safetensors"):
        save_file({name: values for name, values in load_file(path).items() if name != "tokens"}, path)
    latents: Any = stores.open_store(folder)
    assert (latents.tokens, latents.n_contexts, latents.provenance["unknown"]) == ("unknown", 5, ["tokens"])
    ((there, found),) = latents.batches()
    assert there.items.tokens.unique().tolist() == [-1]
    assert torch.equal(found.dense(), by_token(batch, code))
    (folder / "config.json").write_text("{}")
    with pytest.raises(UnweaveError, match="say how long a context is"):
        stores.open_store(folder)
    assert stores.open_store(folder, context_size=8).provenance["unknown"] == ["model", "tokens"]


def test_values_too_large_for_half_precision_stay_whole(tmp_path: Path) -> None:
    batch, _ = coded([8] * 2)
    code = SparseCode.from_dense(torch.full((batch.n_rows, 2), 1e5))
    folder = stores.write_latents(tmp_path / "raw" / "a", [(batch, code)], 2, n_splits=2)
    assert load_file(folder / "0_0.safetensors")["activations"].dtype == np.float32
    ((_, found),) = stores.open_store(folder).batches()  # type: ignore[attr-defined]
    assert found.values.unique().tolist() == [1e5]


def test_what_delphi_cannot_take_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    batch, code = coded([8] * 2)
    cases: list[tuple[str, Any]] = [
        ("not one context of 64", {"context_size": 64}),
        ("1 to 11 splits", {"n_splits": 12}),
        ("expected a code of", {"n_features": 12}),
    ]
    for words, options in cases:
        with pytest.raises(UnweaveError, match=words):
            stores.write_latents(tmp_path / "a", [(batch, code)], **{"n_features": 11, **options})
    broken = SparseCode(code.indices, code.values * float("nan"), code.offsets, 11)
    infinite = SparseCode(code.indices, code.values * float("inf"), code.offsets, 11)
    for bad in (broken, infinite):
        with pytest.raises(UnweaveError, match="NaN or infinity"):
            stores.write_latents(tmp_path / "a", [(batch, bad)], 11)
    rows = ActivationBatch.of_rows(torch.zeros(4, 0))
    with pytest.raises(UnweaveError, match="have no token ids"):
        stores.write_latents(tmp_path / "a", [(rows, SparseCode.empty(4, 11))], 11)
    assert not any(tmp_path.iterdir())
    stores.write_latents(tmp_path / "a", [(batch, code)], 11)
    with pytest.raises(UnweaveError, match="is not empty"):
        stores.write_latents(tmp_path / "a", [(batch, code)], 11)
