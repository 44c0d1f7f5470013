"""``unweave verify`` with a model: every trap that files fall into is caught by its numbers and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    """SAELens's files of a square dictionary, so that nothing but numbers tells a transpose; and its numbers."""
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


TRAPS = {
    "the encoder is transposed": {"tensors": {"W_enc": torch.t}},
    "the decoder is transposed": {"tensors": {"W_dec": torch.t}},
    "the encoder must subtract b_dec": {"apply_b_dec_to_input": False},
}
SITES = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_named(trap: str, right, verify, tmp_path: Path) -> None:
    folder, declared = right
    shown = verify(changed(folder, tmp_path, **TRAPS[trap]), declared, status=1)
    assert "put right" in shown
    assert f"not as declared: {trap}" in shown


@pytest.mark.parametrize("hook", SITES)
def test_a_site_that_is_off_by_one(hook: str, right, verify, tmp_path: Path) -> None:
    folder, declared = right
    shown = verify(changed(folder, tmp_path, hook=hook), declared, status=1)
    assert "as well measured declared put right" in shown
    assert shown.endswith("not as declared: the rows are of another site: it is for those of layers.1")
    assert verify(tmp_path, declared, "--site", "layers.1", status=0).endswith("as declared")


def test_rows_that_are_to_be_scaled(right, verify, model: LanguageModel, documents: list[str], tmp_path: Path) -> None:
    folder, declared = right
    rows = torch.cat([batch.input for batch in TextSource(model, documents, "layers.1", **SIZES).batches()])
    scale = D**0.5 / float(rows.norm(dim=1).mean())
    changed(folder, tmp_path, dict.fromkeys(("b_enc", "b_dec", "threshold"), lambda t: t * scale))
    shown = verify(tmp_path, declared, status=1)
    assert "not as declared: rows must be scaled to an average norm of sqrt(d), and are not" in shown


def test_a_threshold_of_the_other_space(right, verify, tmp_path: Path) -> None:
    folder, declared = right
    changed(folder, tmp_path, dict.fromkeys(("b_enc", "b_dec"), lambda t: t * 0.05))
    shown = verify(tmp_path, declared, "--option", "norm_scaling_factor=0.05", status=1)
    assert "not as declared: the threshold is that of raw rows" in shown


def test_a_k_that_no_file_says(right, trained_model: Path, verify, tmp_path: Path) -> None:
    """Qwen-Scope's layout: k stands in the name of the repository, from which this file was copied."""
    folder, _ = right
    w, declared = load_file(folder / "sae_weights.safetensors"), {"l0": 6.0, "fvu": 0.12}
    state = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"] - w["b_dec"] @ w["W_enc"]}
    torch.save(state | {"b_dec": w["b_dec"]}, tmp_path / "layer1.sae.pt")
    command = [tmp_path / "layer1.sae.pt", declared, "--model", trained_model, "--context-size", CONTEXT]
    shown = verify(*command, status=0)
    assert "note: k is not in its files: taken as 6, the declared L0" in shown
    assert "tells little" not in shown
    shown = verify(command[0], {"l0": declared["l0"]}, *command[2:], status=0)
    assert "note: its L0 is its k on any rows, so it tells little" in shown
    with pytest.raises(UnweaveError, match="k is not in the file: give k="):
        verify(command[0], {"fvu": declared["fvu"]}, *command[2:], status=2)
