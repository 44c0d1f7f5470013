"""``unweave verify`` with a model: every trap that files fall into is caught by its numbers and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import unweave
from unweave import formats
from unweave.cli._app import app
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.formats import Facts
from unweave.sources import LanguageModel, TextSource

D, CONTEXT = 32, 32
SIZES = {"context_size": CONTEXT, "batch_tokens": 1024, "split": "all"}
WHERE = {"layers.1": "blocks.1.hook_resid_post", "layers.2:input": "blocks.2.hook_resid_pre"}


@pytest.fixture(scope="module")
def trained_model(tiny_model: Path, documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained until its layers do something of their own."""
    model = LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")
    network, tokens = model.model, [token for ids in model.tokenize_many(documents) for token in ids]
    rows = torch.tensor(tokens[: len(tokens) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    network.train().requires_grad_(True)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        batch = rows[torch.randint(len(rows), (16,), generator=generator)]
        optimiser.zero_grad()
        network(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("trained-llama")
    network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(trained_model: Path) -> LanguageModel:
    return LanguageModel.load(str(trained_model), dtype="float32", device="cpu")


def trained(model: LanguageModel, documents: list[str], site: str, target: str | None = None, **options: Any) -> Any:
    source = TextSource(model, documents, site, target_site=target, **SIZES)
    rows = [(batch.input, batch.target) for batch in source.batches()]
    inputs, targets = (torch.cat(part) for part in zip(*rows))
    settings = {"arch": "batch_topk", "n_features": D, "k": 6, "epochs": 8, "batch_size": 256, "lr": 3e-3}
    dictionary = unweave.fit(inputs, target=None if target is None else targets, **{**settings, **options})
    measured = unweave.evaluate(dictionary, source, n_rows=2000, n_bootstrap=0, baselines=False, progress=False)
    return dictionary, {"l0": measured["l0"], "fvu": measured["fvu"], "ce-recovered": measured["ce_loss_recovered"]}


@pytest.fixture(scope="module")
def right(
    model: LanguageModel, documents: list[str], trained_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    """SAELens's files of a square dictionary: square, so that nothing but numbers tells a transpose; and its numbers."""
    dictionary, declared = trained(model, documents, "layers.1")
    folder = tmp_path_factory.mktemp("made") / "sae"
    return written(dictionary, folder, trained_model, "layers.1"), declared


def written(dictionary: Dictionary, folder: Path, model: Path | None, site: str | None) -> Path:
    formats.write(dictionary, "saelens", folder, Facts("unweave", "any", model=model and str(model), site=site))
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {"context_size": CONTEXT, "prepend_bos": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def changed(source: Path, place: Path, tensors: dict | None = None, hook: str | None = None, **config: object) -> Path:
    weights = load_file(source / "sae_weights.safetensors")
    weights = {name: (tensors or {}).get(name, lambda t: t)(value).contiguous() for name, value in weights.items()}
    save_file(weights, place / "sae_weights.safetensors")
    settings = json.loads((source / "cfg.json").read_text()) | config
    settings["metadata"] |= {} if hook is None else {"hook_name": hook}
    (place / "cfg.json").write_text(json.dumps(settings))
    return place


@pytest.fixture
def verify(corpus: Path):
    def call(thing: Path, declared: dict[str, float], *arguments: object, status: int) -> str:
        said = [word for name, value in declared.items() for word in (f"--{name}", value)]
        command = ["verify", thing, "--data", corpus, "--tokens", "2k", *said, *arguments]
        result = CliRunner().invoke(app, [str(word) for word in command], catch_exceptions=False)
        assert result.exit_code == status, result.output
        return " ".join(result.output.split())

    return call


def test_what_is_as_declared(right, verify) -> None:
    folder, declared = right
    assert declared["fvu"] < 0.3
    assert declared["ce-recovered"] > 0.5
    shown = verify(folder, declared, status=0)
    assert "at layers.1: " in shown
    assert "contexts of 32 tokens, each with BOS" in shown
    assert shown.endswith("as declared")
    print(shown)
