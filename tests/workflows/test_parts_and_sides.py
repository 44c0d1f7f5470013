"""Runs at composite sites and runs with gradients, from the recipe to the browser."""

import json

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave.activations import ActivationStore
from unweave.dictionaries import TopK
from unweave.dictionaries.topk import TopKConfig
from unweave.errors import UnweaveError
from unweave.runs.recipe import Recipe
from unweave.sources import JoinedSource
from unweave.workflows import Pipeline, harvest_only, harvest_sites

SMALL = {"training": {"batch_size": 128, "ring_rows": 512}}
EVALUATION = {"tokens": 300, "loss_tokens": 100, "n_bootstrap": 20}


class PartsConfig(TopKConfig):
    n_parts: int = 2


class Parts(TopK):
    """Only asks how many parts its rows have."""

    name = "test_parts"
    Config = PartsConfig


PARTS = "tests.workflows.test_parts_and_sides:Parts"


def recipe_of(tiny_model, corpus, arch="topk", options=None, evaluation=None, index=None, **source):
    return Recipe.from_dict(
        {
            "model": {"name": str(tiny_model)},
            "data": {"documents": str(corpus)},
            "source": {"site": "layers.1", "tokens": 1500, "context_size": 32, "batch_tokens": 256, **source},
            "dictionary": {"arch": arch, "n_features": 96, "options": {"k": 4, **(options or {})}},
            "evaluation": evaluation,
            "index": index,
            **SMALL,
        }
    )


def quiet(recipe, folder, lines=None):
    return Pipeline(recipe, folder, say=(lambda line: None) if lines is None else lines.append)


def test_a_run_at_a_composite_site_from_training_to_the_browser(tiny_model, corpus, tmp_path):
    from starlette.testclient import TestClient

    from unweave.web import create_app

    lines = []
    recipe = recipe_of(tiny_model, corpus, site="layers.1..2+layers.0.mlp.up_proj", evaluation=EVALUATION, index={})
    evaluation = quiet(recipe, tmp_path, lines).run()
    assert evaluation.metrics["fvu"].value < 1
    assert {
        "ce_loss_recovered",
        "fvu:layers.1",
        "fvu:layers.2",
        "fvu:layers.0.mlp.up_proj",
    } <= evaluation.metrics.keys()
    assert not any("left out" in line for line in lines)
    run = unweave.load(tmp_path)
    assert run.dictionary.d_in == 128
    assert [part["width"] for part in run.provenance["source"]["parts"]] == [32, 32, 64]
    tokens, code = run.encode("the cat sees the river")
    assert len(tokens) == len(code)
    feature = int(run.features.columns["n_firing"].argmax())
    # Of the parts, layers.2 is the last in the residual stream: what its columns of the atom do to the logits.
    logits = run.model.unembed(run.dictionary.decoder_directions()[:, 32:64])
    shown = torch.tensor(run.features.columns["positive_logit_value"][feature])
    torch.testing.assert_close(shown, logits[feature].topk(len(shown)).values)
    client = TestClient(create_app(run), base_url="http://127.0.0.1:8765")
    assert "layers.1..2+layers.0.mlp.up_proj" in client.get("/").text
    assert client.get(f"/features/{feature}").status_code == 200


def test_no_logit_effects_where_no_part_is_in_the_residual_stream(tiny_model, corpus, tmp_path):
    recipe = recipe_of(tiny_model, corpus, site="layers.*.mlp.up_proj", stream=True, index={})
    quiet(recipe, tmp_path).run()
    assert "positive_logit_value" not in unweave.load(tmp_path).features.columns


def test_a_transcoder_from_and_to_several_sites(tiny_model, corpus, tmp_path):
    recipe = recipe_of(
        tiny_model, corpus, site="layers.0..1.mlp:input", target_site="layers.0..1.mlp", evaluation=EVALUATION
    )
    quiet(recipe, tmp_path).run()
    assert unweave.load(tmp_path).dictionary.config.subtract_bias is False


def test_a_target_for_what_subtracts_no_bias(tiny_model, corpus, tmp_path):
    recipe = recipe_of(tiny_model, corpus, arch="random", site="layers.0.mlp:input", target_site="layers.0.mlp")
    dictionary, _ = quiet(recipe, tmp_path).build()
    assert "subtract_bias" not in type(dictionary.config).model_fields


def test_other_side_inputs_than_an_architecture_needs_are_refused(tiny_model, corpus, tmp_path):
    recipe = recipe_of(tiny_model, corpus, arch="g_sae", side="previous")
    with pytest.raises(
        UnweaveError, match=r"trained with side inputs \(gradient\) and the data has others \(previous\)"
    ):
        quiet(recipe, tmp_path / "run").build()
    store = harvest_only(recipe, tmp_path / "store", lambda line: None)
    with pytest.raises(UnweaveError, match=r"the data has others \(previous\)"):
        unweave.fit(store, "g_sae", k=4, n_features=64, n_rows=500)


def test_the_number_of_parts_goes_to_whoever_has_such_a_field(tiny_model, corpus, tmp_path):
    store = harvest_only(recipe_of(tiny_model, corpus, site="layers.*"), tmp_path / "store", lambda line: None)
    recipe = Recipe.read(None, {"store": str(store.folder), "dictionary": {"arch": PARTS, "options": {"k": 4}}}, [])
    assert quiet(recipe, tmp_path / "a").build()[0].config.n_parts == 4
    given = recipe.replace(dictionary=recipe.dictionary.replace(options={"k": 4, "n_parts": 3}))
    assert quiet(given, tmp_path / "a").build()[0].config.n_parts == 3
    alone = recipe_of(tiny_model, corpus, arch=PARTS, stream=True)
    assert quiet(alone, tmp_path / "b").build()[0].config.n_parts == 1
    unequal = recipe_of(tiny_model, corpus, arch=PARTS, site="layers.1+layers.1.mlp.up_proj", stream=True)
    with pytest.raises(UnweaveError, match=r"parts of one width, found layers.1 \(32\), layers.1.mlp.up_proj \(64\)"):
        quiet(unequal, tmp_path / "c").build()
    fitted = unweave.fit(JoinedSource([store, store]), PARTS, k=4, n_features=64, n_rows=500, batch_size=100)
    assert fitted.config.n_parts == 2
    assert unweave.fit(store.rows(slice(200)), PARTS, k=4, n_features=64, n_rows=500).config.n_parts == 2  # its default


def test_stores_of_patterns_are_folders_one_can_name(tiny_model, corpus, tmp_path):
    stores = harvest_sites(recipe_of(tiny_model, corpus), ["layers.*:input", "layers.1"], tmp_path, lambda line: None)
    assert [store.folder.name for store in stores.values()] == ["layers.all-input", "layers.1"]
    assert stores["layers.*:input"].d_in == 128


def command(*arguments):
    from unweave.cli._app import app

    return CliRunner().invoke(app, list(map(str, arguments)))


def test_g_sae_from_the_command_line(tiny_model, corpus, tmp_path):
    data = ["--model", tiny_model, "--site", "layers.1", "--data", corpus, "--tokens", "2k"]
    data += ["source.context_size=32", "source.batch_tokens=256"]
    small = ["--arch", "g_sae", "--k", "4", "--n-features", "96", "training.batch_size=128", "training.ring_rows=512"]
    small += ["evaluation.tokens=300", "evaluation.loss_tokens=100", "evaluation.n_bootstrap=20"]
    run = tmp_path / "run"
    done = command("train", *data, *small, "--out", run)  # it asks for gradients by itself
    assert done.exit_code == 0, done.output
    assert "ce_loss_recovered" in done.stdout
    store = ActivationStore.open(run / "activations")
    assert store.d_side == 32
    assert store.provenance["side"] == "gradient"
    found = unweave.load(run).dictionary
    assert float(found.gradient_norm) == pytest.approx(
        float(store.sides(slice(None)).float().norm(dim=1).mean()), rel=0.1
    )
    both = [found.encode(store.rows(slice(200)).float(), side) for side in (None, store.sides(slice(200)).float())]
    assert not torch.equal(both[0].dense(), both[1].dense())


def test_temporal_from_the_command_line(tiny_model, corpus, tmp_path):
    data = ["--model", tiny_model, "--site", "layers.1", "--data", corpus, "--tokens", "2k", "--no-eval", "--no-index"]
    data += ["source.context_size=32", "source.batch_tokens=256", "training.batch_size=128", "training.ring_rows=512"]
    done = command("train", *data, "--arch", "temporal", "--k", "4", "--n-features", "96", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    store = ActivationStore.open(tmp_path / "run" / "activations")
    assert store.provenance["side"] == "previous"
    batch = store[:200]
    for row in range(1, 200):
        follows = batch.row_token[row] == batch.row_token[row - 1] + 1 and batch.meta.position[row] > 0
        item, item_before = batch.items.item_of_token[batch.row_token[[row, row - 1]]]
        expected = batch.input[row - 1] if follows and item == item_before else batch.input[row]
        assert torch.equal(batch.side[row], expected)


def test_gradients_on_the_fly(tiny_model, corpus, tmp_path, monkeypatch):
    from unweave.sources import _running

    recipe = recipe_of(tiny_model, corpus, arch="g_sae", side="gradient", stream=True, evaluation=EVALUATION, index={})
    pipeline = quiet(recipe, tmp_path)
    pipeline.train()
    # Measuring and indexing only read activations: nothing goes backwards any more.
    monkeypatch.setattr(_running, "_run", lambda *_: pytest.fail("a gradient was made"))
    assert pipeline.evaluate().metrics["ce_loss_recovered"].value is not None
    assert pipeline.index().n_features == 96


def test_a_store_keeps_its_gradients_for_later(tiny_model, corpus, tmp_path):
    recipe = recipe_of(tiny_model, corpus, side="gradient", dtype="int8")
    store = harvest_only(recipe, tmp_path / "store", lambda line: None)
    assert store.side_dtype == torch.bfloat16
    plain = harvest_only(recipe_of(tiny_model, corpus), tmp_path / "plain", lambda line: None)
    assert "side" not in json.dumps(plain.provenance)
    later = {"dictionary": {"arch": "g_sae", "options": {"k": 4}}, "evaluation": None, "index": None, **SMALL}
    found = Recipe.read(None, {"store": str(store.folder), **later}, [])
    assert found.source.side == "gradient"
    quiet(found, tmp_path / "run").run()
    with pytest.raises(UnweaveError, match=r"harvested with source.side None, not 'gradient'"):
        Recipe.read(None, {"store": str(plain.folder), "source": {"side": "gradient"}}, [])
    with pytest.raises(UnweaveError, match="g_sae is trained with side inputs"):
        quiet(Recipe.read(None, {"store": str(plain.folder), **later}, []), tmp_path / "other").run()
