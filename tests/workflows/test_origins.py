"""Atoms that are rows of the data carry their text from training to the browser."""

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave.dictionaries import get, names

SMALL = ["--tokens", "1500", "--n-features", "96", "--k", "4", "source.context_size=32", "source.batch_tokens=256"]
SMALL += ["training.batch_size=128", "training.ring_rows=512", "--no-eval"]


def command(*arguments):
    from unweave.cli._app import app

    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("stream", [False, True])
def test_every_atom_of_itda_has_its_text(stream, tiny_model, corpus, tmp_path):
    from starlette.testclient import TestClient

    from unweave.web import create_app

    where = ["--model", tiny_model, "--site", "layers.1", "--data", corpus, "--out", tmp_path / "run"]
    done = command("train", *where, *SMALL, "--arch", "itda", *(["--stream"] if stream else []))
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    run = unweave.load(tmp_path / "run")
    size = int(run.dictionary.size)
    assert f"found the text of {size} of 96 atoms" in done.output
    features = [feature for feature in run.features if feature.origin is not None]
    assert len(features) == size > 32
    feature = next(f for f in features[size // 2 :] if f.origin.before.startswith("<bos>"))
    origin = feature.origin
    # The atom is the activation of that token in that text: running the model on it gives the atom's direction.
    ids = run.model.tokenize(origin.before.removeprefix("<bos>")) + run.model.tokenize(origin.text)
    row = run.model.run_to("layers.1", torch.tensor([[0, *ids]]))["layers.1"][0, -1].float()
    atom = run.dictionary.decoder_directions()[feature.index]
    assert float(torch.cosine_similarity(row, atom, dim=0)) > 0.99
    shown = command("inspect", tmp_path / "run", "--feature", feature.index).stdout
    assert f"»{origin.text}«" in shown.replace("\n", "")
    client = TestClient(create_app(run), base_url="http://127.0.0.1:8765")
    assert "The row it is" in client.get("/features").text
    assert "The row at" in client.get(f"/features/{feature.index}").text
    assert client.get(f"/api/features/{feature.index}").json()["origin"] == vars(origin)


def test_who_says_so_is_asked_and_nobody_else(tiny_model, corpus, tmp_path):
    ours = [name for name in names() if get(name).__module__.startswith("unweave.")]  # tests register others
    assert [name for name in ours if get(name).atoms_are_rows] == ["itda"]
    where = ["--model", tiny_model, "--site", "layers.1", "--data", corpus, "--out", tmp_path / "run"]
    assert command("train", *where, *SMALL, "--arch", "mp").exit_code == 0
    assert unweave.load(tmp_path / "run").features[0].origin is None
