"""A finished run, read from Python."""

import json
import shutil

import pytest
import torch

import unweave
from unweave.errors import UnweaveError
from unweave.runs.recipe import Recipe
from unweave.workflows import Pipeline


@pytest.fixture(scope="module")
def folder(tiny_model, corpus, tmp_path_factory):
    recipe = Recipe(
        model={"name": str(tiny_model), "dtype": "float32"},
        data={"documents": str(corpus)},
        source={"site": "layers.1", "tokens": 3000, "context_size": 16, "batch_tokens": 128},
        dictionary={"arch": "topk", "expansion": 4, "options": {"k": 4}},
        training={"passes": 3, "batch_size": 128, "ring_rows": 1024},
        evaluation={"tokens": 500, "loss_tokens": 0, "n_bootstrap": 20},
    )
    place = tmp_path_factory.mktemp("runs") / "run"
    Pipeline(recipe, place, say=lambda line: None).run()
    return place


def test_encode_gives_a_code_for_every_token(folder):
    run = unweave.load(folder)
    text = "the old king paints the café. snow ❄ " * 8
    tokens, code = run.encode(text)
    assert "".join(tokens) == text
    assert len(code) == len(tokens) > 16  # several contexts
    assert code.n_features == 128
    assert code.l0().max() <= 4


def test_encode_equals_the_training_path(folder, tiny_model):
    """The codes of a text are those of the rows a TextSource makes of it: same BOS, same contexts."""
    run = unweave.load(folder)
    text = "one engineer repairs an engine. my aunt sees the river. the cat buys three letters."
    model = run.model
    ids = model.tokenize(text)
    rows = []
    for start in range(0, len(ids), 15):  # BOS takes one place of 16
        context = torch.tensor([[0, *ids[start : start + 15]]])
        rows.append(model.run_to("layers.1", context)["layers.1"][0, 1:])
    expected = run.dictionary.encode(torch.cat(rows).float())
    torch.testing.assert_close(run.encode(text).code.dense(), expected.dense(), rtol=1e-4, atol=1e-5)


def test_top_and_values_of_a_text(folder):
    text = unweave.load(folder).encode("the small robot dreams of snow.")
    feature, peak = text.top(1)[0]
    assert max(text.values(feature), key=abs) == pytest.approx(peak)
    assert len(text.values(feature)) == len(text)
    assert str(feature) in repr(text)


def test_features_slicing_and_texts(folder):
    run = unweave.load(folder)
    feature = next(f for f in run.features[0:128] if not f.is_dead)
    assert "«" in repr(feature) or "»" in repr(feature)
    context = feature.top[0]
    assert context.text == "".join(context.tokens)
    assert context.values[context.peak] == pytest.approx(context.value, rel=1e-2)
    assert run.name == "run"
    assert "topk" in repr(run)


def test_a_feature_fires_on_its_own_top_context(folder):
    """What the store shows is what the model gives: encode a short document again and find the stored peak."""
    run = unweave.load(folder)
    checked = 0
    for feature in run.features[0:128]:
        for context in feature.top[:1]:
            if context.position >= 10:
                continue
            shown = [token for token in context.tokens[: context.peak + 1] if token != "<bos>"]
            encoded = run.encode("".join(shown))
            if encoded.tokens != shown:
                continue  # cut in the middle of a word
            if context.position + 1 == len(encoded):
                checked += 1
                assert encoded.values(feature.index)[-1] == pytest.approx(context.value, rel=2e-2, abs=1e-3)
    assert checked > 5


def test_another_model_is_refused_unless_forced(folder, tiny_model, tmp_path):
    from transformers import LlamaForCausalLM

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(other)
    with pytest.raises(UnweaveError, match="was trained on"):
        unweave.load(folder, model=str(other)).encode("the cat")
    assert len(unweave.load(folder, model=str(other), force=True).encode("the cat")) > 0
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    assert len(unweave.load(folder, model=str(moved)).encode("the cat")) > 0
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("activations"))
    (tmp_path / "run" / "provenance.json").unlink()  # nothing is left that tells one model from another
    with pytest.raises(UnweaveError, match=r"nothing tells whether .*moved is the model"):
        unweave.load(tmp_path / "run", model=str(moved)).encode("the cat")
    assert len(unweave.load(tmp_path / "run", model=str(moved), force=True).encode("the cat")) > 0


def test_broken_runs_are_told_apart(folder, tmp_path):
    with pytest.raises(UnweaveError, match="no folder"):
        unweave.load(tmp_path / "none")
    (tmp_path / "begun").mkdir()
    shutil.copy(folder / "recipe.yaml", tmp_path / "begun")
    with pytest.raises(UnweaveError, match="run the same command again"):
        unweave.load(tmp_path / "begun")
    with pytest.raises(UnweaveError, match="is not a run"):
        unweave.load(tmp_path)
    with pytest.raises(UnweaveError, match="the text is empty"):
        unweave.load(folder).encode("  ")
    shutil.copytree(folder, tmp_path / "wide", ignore=shutil.ignore_patterns("activations"))
    config = json.loads((tmp_path / "wide" / "dictionary" / "config.json").read_text())
    unweave.build("topk", 20, 128, k=4).save(tmp_path / "wide" / "dictionary")
    assert config["d_in"] == 32
    with pytest.raises(UnweaveError, match=r"expected rows of width 20.*found shape"):
        unweave.load(tmp_path / "wide").encode("the cat sees snow")
