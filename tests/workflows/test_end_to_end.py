"""End-to-end training from the command line to the browser; what cannot be trained so is told before any work."""

import json

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave.errors import UnweaveError
from unweave.runs.recipe import Recipe
from unweave.workflows import Pipeline

SMALL = ["--tokens", "1500", "--n-features", "96", "--k", "4", "source.context_size=32", "source.batch_tokens=256"]
SMALL += ["training.batch_size=128", "model.dtype=float32", "training.log_every=2", "evaluation.n_bootstrap=20"]
SMALL += ["evaluation.tokens=300", "evaluation.loss_tokens=100"]


def command(*arguments):
    from unweave.cli._app import app

    return CliRunner().invoke(app, list(map(str, arguments)))


def train(tiny_model, corpus, out, *more, site="layers.1"):
    where = ["--model", tiny_model, "--site", site, "--data", corpus, "--out", out]
    return command("train", *where, *SMALL, *more)


def lines_of(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "rows_per_s"} for line in found]


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_the_whole_way(objective, tiny_model, corpus, tmp_path):
    from starlette.testclient import TestClient

    from unweave.web import create_app

    run_folder = tmp_path / "run"
    more = ["training.local_coefficient=0.1"] if objective == "ce" else ["training.downstream_coefficient=0.5"]
    done = train(tiny_model, corpus, run_folder, "--objective", objective, *more)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    assert f"end to end ({objective})" in done.output
    assert "ce_loss_recovered" in done.stdout
    assert not (run_folder / "activations").exists()
    assert {objective, "mse", "fvu"} <= lines_of(run_folder)[-1].keys()
    assert (objective == "kl") == ("downstream" in lines_of(run_folder)[-1])
    settings = json.loads((run_folder / "training.json").read_text())["config"]
    assert settings["kl_coefficient"] == (objective == "kl")
    assert settings["ce_coefficient"] == (objective == "ce")
    client = TestClient(create_app(unweave.load(run_folder)), base_url="http://127.0.0.1:8765")
    assert f"{objective.upper()}, end to end" in client.get("/").text
    assert client.get("/features").status_code == 200
    again = train(tiny_model, corpus, run_folder, "--objective", objective, *more)
    assert again.exit_code == 0
    other = train(tiny_model, corpus, run_folder, "--objective", "mse")
    assert "begun with another recipe: " in str(other.exception)


def test_a_killed_run_ends_with_the_same_bits(tiny_model, corpus, tmp_path, monkeypatch):
    from unweave.training._end_to_end import EndToEndTrainer

    class Killed(Exception):
        pass

    options = ["--objective", "kl", "--no-eval", "--no-index", "training.checkpoint_every=3"]
    assert train(tiny_model, corpus, tmp_path / "whole", *options).exit_code == 0
    advance = EndToEndTrainer.advance

    def until(trainer):
        if trainer.step == 7:
            raise Killed
        advance(trainer)

    monkeypatch.setattr(EndToEndTrainer, "advance", until)
    assert isinstance(train(tiny_model, corpus, tmp_path / "killed", *options).exception, Killed)
    monkeypatch.undo()
    assert train(tiny_model, corpus, tmp_path / "killed", *options).exit_code == 0
    a, b = (unweave.load(tmp_path / name).dictionary.state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")


@pytest.mark.parametrize(
    ("more", "site", "message"),
    [
        (["--objective", "kl"], "layers.1+layers.2", "splices into one site, and layers.1[+]layers.2 is several"),
        (["--objective", "kl", "--arch", "itda"], "layers.1", "itda learns without gradients"),
        (["--objective", "kl", "--arch", "g_sae"], "layers.1", "g_sae chooses or learns by side inputs"),
        (["--objective", "kl", "model.dtype=float16"], "layers.1", "gradients in float16 underflow"),
        (["--objective", "kl", "training.downstream_coefficient=1"], "layers.3", "no block comes behind"),
        (["--objective", "likelihood"], "layers.1", "objective: Input should be 'mse', 'kl' or 'ce'"),
        (["training.local_coefficient=1"], "layers.1", "local_coefficient is of end-to-end training"),
        (["--objective", "kl", "source.dtype=int8"], "layers.1", "dtype says how rows are stored"),
    ],
)
def test_what_cannot_be_is_told_before_the_work(more, site, message, tiny_model, corpus, tmp_path):
    done = train(tiny_model, corpus, tmp_path / "run", *more, site=site)
    assert isinstance(done.exception, UnweaveError)
    with pytest.raises(UnweaveError, match=message):
        raise done.exception
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_neither_a_store_nor_a_sweep_has_a_model_to_run(tiny_model, corpus, tmp_path):
    from unweave.workflows import harvest_only
    from unweave.workflows.sweep import sweep

    values = {
        "model": {"name": str(tiny_model)},
        "data": {"documents": str(corpus)},
        "source": {"site": "layers.1", "tokens": 300, "context_size": 32, "batch_tokens": 256},
    }
    harvest_only(Recipe.from_dict(values), tmp_path / "store", say=lambda line: None)
    with pytest.raises(UnweaveError, match=r"objective=kl runs the model on text at every step, and a store"):
        Recipe.read(None, {"store": str(tmp_path / "store"), "training": {"objective": "kl"}}, [])
    recipe = Recipe.from_dict({**values, "training": {"objective": "kl"}})
    with pytest.raises(UnweaveError, match="train end to end one by one"):
        sweep(recipe, {"k": [2, 4]}, tmp_path / "sweep", say=lambda line: None)
    assert Pipeline(recipe, tmp_path / "run", say=lambda line: None).recipe.source.stream
