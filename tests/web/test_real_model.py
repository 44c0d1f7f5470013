"""From a text file and a small model to the browser, with nothing standing in for anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from starlette.testclient import TestClient

import unweave.dictionaries
from unweave.features import IndexConfig, build_features
from unweave.runs import Run
from unweave.web import create_app, export_html


@pytest.fixture(scope="module")
def model_run(tiny_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from unweave.sources import LanguageModel, TextSource, read_documents

    folder = tmp_path_factory.mktemp("real") / "tiny"
    model = LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")
    source = TextSource(model, read_documents(corpus, limit=80), "layers.1", context_size=48)
    torch.manual_seed(0)
    dictionary = unweave.dictionaries.build("topk", d_in=source.d_in, n_features=128, k=4)
    first = next(iter(source.batches())).input.float()
    dictionary.initialise(first, first)
    dictionary.eval().save(folder / "dictionary")
    recipe = {
        "model": {"name": str(tiny_model), "dtype": "float32", "device": "cpu"},
        "data": {"documents": str(corpus)},
        "source": {"site": "layers.1", "context_size": 48},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    build_features(
        folder / "features",
        dictionary,
        source.batches(),
        token_bytes=model.token_bytes(),
        unembed=model.unembed,
        config=IndexConfig(n_top=5),
    )
    return Run(folder)


def test_every_page_of_a_real_run(model_run: Run, tmp_path: Path) -> None:
    client = TestClient(create_app(model_run), base_url="http://127.0.0.1:1", follow_redirects=False)
    pages = ["/", "/features", "/try", *(f"/features/{i}" for i in range(128))]
    assert [client.get(page).status_code for page in pages] == [200] * len(pages)
    live = model_run.features.list(limit=1).rows[0].index  # type: ignore[union-attr]
    assert "Raises" in client.get(f"/features/{live}").text
    assert export_html(model_run, [live], tmp_path / "one.html").stat().st_size > 10_000


def test_own_text_through_the_real_model(model_run: Run) -> None:
    client = TestClient(create_app(model_run), base_url="http://127.0.0.1:1")
    text = "the old king paints the café ❄."
    answer: Any = client.post("/api/encode", json={"text": text})
    if answer.status_code == 202:
        client.app.state.encoder.wait(60)  # type: ignore[attr-defined]
        answer = client.post("/api/encode", json={"text": text})
    data = answer.json()
    assert "".join(token["text"] for token in data["tokens"]) == text
    assert all(token["n_firing"] <= 4 for token in data["tokens"])
    strongest = data["top"][0]
    at = dict(map(tuple, data["tokens"][strongest["token"]]["features"]))
    assert at[strongest["index"]] == pytest.approx(strongest["value"], rel=1e-3)
    one = client.post("/api/encode", json={"text": text, "feature": strongest["index"]}).json()
    assert max(abs(t["value"]) for t in one["tokens"]) == pytest.approx(abs(strongest["value"]), rel=1e-3)
