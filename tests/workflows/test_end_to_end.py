"""End-to-end training from the command line to the browser; what cannot be trained so is told before any work."""

import json

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave.errors import UnweaveError
from unweave.runs.recipe import Recipe
from unweave.workflows import Pipeline
from unweave.workflows.publishing import prepare

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
    text = (prepare(run_folder, tmp_path / "published") / "README.md").read_text()
    assert ("KL to the model's own predictions, times 1" in text) == (objective == "kl")
    assert ("cross-entropy of the text, times 1" in text) == (objective == "ce")
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


@pytest.fixture(scope="module")
def local(tiny_model, corpus, tmp_path_factory):
    """A run trained on its rows alone."""
    folder = tmp_path_factory.mktemp("local") / "run"
    done = train(tiny_model, corpus, folder, "--passes", "4", "--arch", "topk", "--no-index")
    assert done.exit_code == 0, done.output
    return folder


def test_a_run_is_gone_on_from_end_to_end(local, tmp_path):
    again = ["train", "--from", local, "--objective", "kl", "--tokens", "600", "--no-index", "training.batch_size=128"]
    again += ["evaluation.tokens=300", "evaluation.loss_tokens=100", "evaluation.n_bootstrap=20"]
    done = command(*again, "training.lr=1e-9", "--out", tmp_path / "same")
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    # Hardly any learning: the very dictionary, whatever was scaled on the way.
    before, after = (unweave.load(folder).dictionary for folder in (local, tmp_path / "same"))
    rows = 0.1 * torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after.decoder_directions(), before.decoder_directions(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after(rows), before(rows), rtol=1e-3, atol=1e-3)
    done = command(*again, "training.lr=3e-3", "--out", tmp_path / "tuned")
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    kl = [lines_of(tmp_path / name)[-1]["kl"] for name in ("same", "tuned")]
    assert kl[1] < kl[0]
    settings = json.loads((tmp_path / "tuned" / "training.json").read_text())["config"]
    assert settings["continued"] is True
    assert Recipe.of_run(tmp_path / "tuned").dictionary.start == str(local)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "8"], "k is 4 there and 8 now"),
        (["--arch", "batch_topk"], "threshold_rate is None there and"),
        (["--site", "layers.1.mlp.up_proj"], "d_in is 32 there and 64 now"),
    ],
)
def test_going_on_means_with_the_same_dictionary(more, message, local, tmp_path):
    done = command("train", "--from", local, *more, "--out", tmp_path / "run")
    with pytest.raises(UnweaveError, match=message):
        raise done.exception
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    done = command("train", "--from", tmp_path / "nothing", "--out", tmp_path / "run")
    with pytest.raises(UnweaveError, match=r"nothing holds no recipe\.yaml"):
        raise done.exception


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


@pytest.mark.real
@pytest.mark.slow
def test_a_short_fine_tuning_of_a_real_model_lowers_the_kl(demo_run, tmp_path):
    """The demo's dictionary, gone on from with KL and its reconstruction: measured on held-out text."""
    done = command(
        *("train", "--from", demo_run, "--objective", "kl", "--tokens", "4k", "--no-index", "--out", tmp_path / "run"),
        *("training.local_coefficient=0.5", "training.batch_size=512", "source.context_size=64"),
        *("evaluation.tokens=4096", "evaluation.loss_tokens=512", "evaluation.n_bootstrap=50"),
        *("evaluation.baselines=false", "training.lr=3e-4"),
    )
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    before, after = (
        unweave.load(folder).evaluation["metrics"]["kl"]["value"] for folder in (demo_run, tmp_path / "run")
    )
    assert after < before
