"""Other libraries' stores from end to end: activations in, codes in and out, killed in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import unweave
from unweave.activations import ActivationStore
from unweave.codes import SparseCode
from unweave.dictionaries import build
from unweave.errors import UnweaveError
from unweave.features import build_features
from unweave.formats import stores
from unweave.runs import Run
from unweave.workflows.stores import export_latents, import_store

GOLDEN = Path(__file__).parent.parent / "formats" / "stores" / "golden"
CACHE, LATENTS = GOLDEN / "saelens" / "float32", GOLDEN / "delphi" / "raw" / "layers.1"


def silent(line: str) -> None:
    """No word."""


def test_a_killed_import_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unweave.formats.stores._base.BATCH_ROWS", 12)  # two contexts a batch
    monkeypatch.setattr("unweave.activations.store.default_shard_rows", lambda _: 12)
    whole = import_store(CACHE, tmp_path / "whole", options={"site": "layers.1"}, say=silent)
    assert isinstance(whole, ActivationStore)
    assert (whole.n_rows, whole.n_shards) == (72, 6)

    read: Any = stores.SAELensCache._read
    seen: list[int] = []

    def killed(self: Any, *arguments: Any) -> Any:
        for batch in read(self, *arguments):
            seen.append(batch.n_rows)
            if len(seen) == 4:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(stores.SAELensCache, "_read", killed)
        with pytest.raises(KeyboardInterrupt):
            import_store(CACHE, tmp_path / "cut", options={"site": "layers.1"}, say=silent)
    assert ActivationStore.open(tmp_path / "cut").n_rows == 36
    import_store(CACHE, tmp_path / "cut", options={"site": "layers.1"}, say=silent)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UnweaveError, match=r"holds other activations: site: expected \"layers.2\""):
        import_store(CACHE, tmp_path / "cut", options={"site": "layers.2"}, say=silent)


def test_only_some_rows_and_int8(tmp_path: Path) -> None:
    store = import_store(CACHE, tmp_path / "s", n_rows=5, dtype="int8", model="gpt2", say=silent)
    assert isinstance(store, ActivationStore)
    assert (store.manifest.dtype, store.provenance["model"]) == ("int8", {"name": "gpt2"})
    exact = import_store(CACHE, tmp_path / "exact", say=silent)
    assert isinstance(exact, ActivationStore)
    assert (store.n_rows, exact.n_rows) == (24, 72)  # whole batches: those of the cache's first file
    torch.testing.assert_close(store.rows(slice(None)), exact.rows(slice(24)), rtol=0.02, atol=0.02)


def test_activations_and_codes_take_what_is_theirs(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="holds activations: train a dictionary"):
        import_store(CACHE, tmp_path / "a", dictionary="x", say=silent)
    with pytest.raises(UnweaveError, match="leave rows and dtype out"):
        import_store(LATENTS, tmp_path / "a", n_rows=10, say=silent)
    build("topk", 8, 40, k=5).save(tmp_path / "other")
    with pytest.raises(UnweaveError, match=r"has 40 features, the codes in .* are of 50"):
        import_store(LATENTS, tmp_path / "a", dictionary=tmp_path / "other", say=silent)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UnweaveError, match="is not empty and holds no run of imported codes"):
        import_store(LATENTS, tmp_path / "other", say=silent)


def test_codes_become_a_run_and_delphi_s_files_again(tmp_path: Path) -> None:
    run = import_store(LATENTS, tmp_path / "run", say=silent)
    assert isinstance(run, Run)
    assert not run.has_dictionary
    with pytest.raises(UnweaveError, match="imported codes and no dictionary"):
        _ = run.dictionary
    assert "codes of 50 features, without their dictionary" in repr(run)
    assert run.provenance["source"]["library"] == "delphi"
    features = run.features
    assert features is not None
    assert (features.n_rows, features.n_items) == (384, 12)
    assert features[3].similar == features[3].positive_logits == []
    assert features[3].top[0].tokens[features[3].top[0].peak].strip().startswith("⟨")
    folder = export_latents(tmp_path / "run", tmp_path / "raw", n_splits=3)
    assert (folder.name, json.loads((folder / "config.json").read_text())["model_name"]) == ("layers.1", "tiny")
    for path in LATENTS.glob("*_*.safetensors"):
        from safetensors.torch import load_file

        mine, theirs = load_file(folder / path.name), load_file(path)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert all(mine[name].dtype == theirs[name].dtype for name in theirs)
    import_store(LATENTS, tmp_path / "run", say=silent)  # again, in place of it
    assert unweave.load(tmp_path / "run").features[3].n_firing == features[3].n_firing  # type: ignore[union-attr]


def test_with_their_dictionary_and_model_they_are_shown_in_full(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dictionary = build("topk", 32, 50, k=5)
    dictionary.save(tmp_path / "dictionary")
    run = import_store(LATENTS, tmp_path / "run", dictionary=tmp_path / "dictionary", model=str(tiny_model), say=silent)
    assert isinstance(run, Run)
    assert run.features is not None
    feature = run.features[int(run.features.table["n_firing"].argmax())]
    assert len(feature.similar) == len(feature.positive_logits) == 10
    assert not any(token.startswith("⟨") for token in feature.top[0].tokens)
    assert torch.equal(run.dictionary.decoder_directions(), dictionary.decoder_directions())


def test_a_trained_dictionary_is_not_written_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    dictionary = unweave.fit(torch.randn(64, 8), arch="topk", n_features=50, k=2, epochs=1, folder=run)
    build_features(run / "features", dictionary, unweave.ArraySource(torch.randn(64, 8)).batches())
    before = (run / "dictionary" / "dictionary.safetensors").read_bytes()
    build("topk", 8, 50, k=5).save(tmp_path / "dictionary")
    with pytest.raises(UnweaveError, match="is not empty and holds no run of imported codes"):
        import_store(LATENTS, run, dictionary=tmp_path / "dictionary", say=silent)
    assert (run / "dictionary" / "dictionary.safetensors").read_bytes() == before


def test_a_dictionary_and_rows_give_latents(tmp_path: Path) -> None:
    import_store(CACHE, tmp_path / "store", say=silent)
    torch.manual_seed(0)
    dictionary = build("topk", 8, 30, k=3)
    dictionary.save(tmp_path / "dictionary")
    folder = export_latents(tmp_path / "dictionary", tmp_path / "raw", store=tmp_path / "store", model="gpt2")
    latents: Any = stores.open_store(folder)
    assert (latents.model, latents.context_size, latents.n_contexts) == ("gpt2", 6, 12)
    found = SparseCode.concatenate([code for _, code in latents.batches()]).dense()
    with torch.no_grad():
        code = dictionary.encode(ActivationStore.open(tmp_path / "store").rows(slice(None))).dense()
    torch.testing.assert_close(found, code, rtol=1e-3, atol=1e-4)  # they are kept as float16
    build("topk", 9, 30, k=3).save(tmp_path / "wide")
    with pytest.raises(UnweaveError, match=r"rows of width 8, .* reads rows of 9"):
        export_latents(tmp_path / "wide", tmp_path / "raw2", store=tmp_path / "store")
    with pytest.raises(UnweaveError, match="holds no codes: run `unweave index`"):
        export_latents(tmp_path / "dictionary", tmp_path / "raw2")
    shutil.rmtree(tmp_path / "store")
    nowhere = unweave.harvest(unweave.ArraySource(torch.randn(40, 8)), tmp_path / "store", n_rows=40)
    with pytest.raises(UnweaveError, match="name of a hookpoint"):
        export_latents(tmp_path / "dictionary", tmp_path / "raw2", store=nowhere.folder)
    with pytest.raises(UnweaveError, match="name of a hookpoint"):
        export_latents(tmp_path / "dictionary", tmp_path / "raw2", store=nowhere.folder, hookpoint="..")
    more = {"store": nowhere.folder, "hookpoint": "a", "context_size": -5}
    with pytest.raises(UnweaveError, match="at least one token"):
        export_latents(tmp_path / "dictionary", tmp_path / "raw2", **more)
    with pytest.raises(UnweaveError, match="have no token ids"):
        export_latents(tmp_path / "dictionary", tmp_path / "raw2", store=nowhere.folder, hookpoint="a")
