"""What the real libraries stored (``golden/make.py``) reads here as it reads there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unweave.activations import ActivationStore, harvest
from unweave.batch import ActivationBatch
from unweave.codes import SparseCode
from unweave.formats import stores

GOLDEN = Path(__file__).parent / "golden"
HOOK = "blocks.1.hook_resid_post"
CASES = [
    ("saelens/float32", "rows", {}),
    ("saelens/float16", "rows", {}),
    ("saelens/parquet", "rows", {}),
    ("saev/one_layer", "rows.11", {}),
    ("saev/two_layers", "rows.3", {"layer": 3}),
    ("saev/two_layers", "rows.11", {"layer": 11}),
    (f"llamascopium/bfloat16/{HOOK}", "rows", {}),
    (f"llamascopium/pt/{HOOK}", "rows", {}),
]


@pytest.mark.parametrize(("case", "name", "options"), CASES)
def test_rows_and_tokens_are_the_library_s(case: str, name: str, options: dict, tmp_path: Path) -> None:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    source = stores.open_store(GOLDEN / case, **options)
    assert stores.recognised(GOLDEN / case) == source.name == case.split("/")[0]
    assert isinstance(source, stores.ForeignRows)
    store = harvest(source, tmp_path / "store", n_rows=source.n_rows)
    store.verify(progress=False)
    assert str(store.dtype) == f"torch.{source.dtype}"
    rows, theirs = store.rows(slice(None)).float(), expected[name].reshape(-1, 8).float()
    assert torch.equal(rows, theirs)
    tokens = store.meta(slice(None)).token.long()
    assert torch.equal(tokens, expected["tokens"].reshape(-1) if "tokens" in expected else torch.full_like(tokens, -1))


def test_what_is_known_of_them_is_kept_and_what_is_not_is_said() -> None:
    saelens = stores.open_store(GOLDEN / "saelens" / "float32")
    assert (saelens.model, saelens.site, saelens.tokens) == (None, "layers.1", "kept")
    assert saelens.provenance["unknown"] == ["model"]
    assert ("model", "unknown") in saelens.facts()
    told = stores.open_store(GOLDEN / "saelens" / "float32", model="gpt2", site="layers.2").provenance
    assert (told["model"], told["site"]) == ({"name": "gpt2"}, "layers.2")
    assert "options" not in told
    saev = stores.open_store(GOLDEN / "saev" / "two_layers", layer=11)
    assert (saev.model, saev.site, saev.tokens) == ("ViT-B-32/openai", "layers.11", "none")
    assert "unknown" not in saev.provenance
    assert saev.provenance["options"] == {"layer": 11}
    chunks = stores.open_store(GOLDEN / "llamascopium" / "bfloat16" / HOOK)
    assert (chunks.model, chunks.site, chunks.data["name"]) == ("tiny", "layers.1", "tiny/text")


def test_positions_are_those_in_the_context(tmp_path: Path) -> None:
    chunks = stores.open_store(GOLDEN / "llamascopium" / "bfloat16" / HOOK)
    store = harvest(chunks, tmp_path / "chunks", n_rows=chunks.n_rows)
    lengths = store.items.offsets.diff().tolist()
    assert lengths == [6, 6, 4, 6, 6, 6, 6, 6, 6, 2, 6]  # without the padding
    meta = store.meta(slice(0, 10))
    assert meta.position.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]  # the BOS has no row
    assert meta.document.tolist() == [0] * 5 + [1] * 5
    assert store.items.tokens[0] == 0
    saev = stores.open_store(GOLDEN / "saev" / "two_layers", layer=3)
    patches = harvest(saev, tmp_path / "patches", n_rows=saev.n_rows)
    assert patches.meta(slice(0, 6)).position.tolist() == [1, 2, 3, 4, 5, 6]  # behind the CLS token
    every = stores.open_store(GOLDEN / "saev" / "two_layers", layer=3, cls=True)
    assert harvest(every, tmp_path / "every", n_rows=every.n_rows).n_rows == 49


def dense_of(latents: stores.Latents) -> tuple[torch.Tensor, torch.Tensor, list[ActivationBatch]]:
    batches, codes = zip(*latents.batches())
    tokens = torch.cat([batch.items.tokens for batch in batches])
    return SparseCode.concatenate(list(codes)).dense(), tokens, list(batches)


def test_delphi_s_codes_are_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = GOLDEN / "delphi" / "raw" / "layers.1"
    expected = load_file(folder / "expected.safetensors")
    latents = stores.open_store(folder)
    assert isinstance(latents, stores.Latents)
    assert (latents.n_features, latents.n_contexts, latents.context_size) == (50, 12, 32)
    assert (latents.model, latents.site, latents.hookpoint) == ("tiny", "layers.1", "layers.1")
    code, tokens, batches = dense_of(latents)
    assert torch.equal(code, expected["code"].float())
    assert torch.equal(tokens.long(), expected["tokens"].reshape(-1))
    assert len(batches) == 1
    monkeypatch.setattr("unweave.formats.stores.delphi._ENTRIES", 200)  # in many pieces
    again, tokens, batches = dense_of(stores.open_store(folder))  # pyright: ignore[reportArgumentType]
    assert len(batches) > 5
    assert torch.equal(again, code)
    assert torch.cat([batch.items.document for batch in batches]).tolist() == list(range(12))


def test_an_imported_store_is_one_as_any_other(tmp_path: Path) -> None:
    import unweave

    source = stores.open_store(GOLDEN / "saelens" / "float32")
    harvest(source, tmp_path / "store", n_rows=source.n_rows)
    store = ActivationStore.open(tmp_path / "store")
    dictionary = unweave.fit(store, arch="topk", n_features=16, k=2, epochs=2, batch_size=32)
    unweave.fit(source, arch="topk", n_features=16, k=2, n_rows=64, batch_size=32)  # without a copy
    found = unweave.evaluate(dictionary, store, n_rows=60, baselines=False, n_bootstrap=10, progress=False)
    assert found["l0"] == 2
