"""Dialogues through the pipeline: what a user types, the run it leaves, and going on after a kill."""

import json

import pytest
import torch

import unweave
from unweave.errors import UnweaveError
from unweave.runs.recipe import Recipe
from unweave.workflows import Pipeline, harvest_only

SMALL = [
    *("dictionary.expansion=2", "dictionary.options.k=4", "training.batch_size=128", "training.ring_rows=512"),
    *("training.mixing=halves", "source.tokens=3000", "source.batch_tokens=400", "model.dtype=float32"),
    *("evaluation.tokens=400", "evaluation.loss_tokens=200", "evaluation.n_bootstrap=20"),
]


def silent(line: str) -> None:
    """No word."""


@pytest.fixture(scope="module")
def files(chats, tmp_path_factory):
    """A folder with a file of 120 dialogues."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return folder


def recipe_of(chat_model, documents, *overrides):
    given = {
        "model": {"name": str(chat_model)},
        "data": {"documents": documents, "format": "chat"},
        "source": {"site": "layers.1"},
    }
    return Recipe.read(None, given, [*SMALL, *overrides])


def test_from_dialogues_to_a_run(chat_model, files, tmp_path):
    recipe = recipe_of(chat_model, str(files / "a.jsonl"))
    assert (recipe.source.context_size, recipe.source.keep_special, recipe.source.max_norm_ratio) == (8192, True, None)
    assert recipe_of(chat_model, "x", "source.context_size=99").source.context_size == 99
    evaluation = Pipeline(recipe, tmp_path / "run", silent).run()
    assert evaluation is not None
    assert evaluation["special_mse"] > 0
    run = unweave.load(tmp_path / "run")
    assert run.recipe["source"]["context_size"] == 8192
    assert len(run.encode("the cat sees the river")) > 3
    assert run.features is not None
    assert run.provenance["source"]["data"]["format"] == "chat"


def test_a_mix_without_its_copies(chat_model, tmp_path):
    """40 dialogues in one file, 20 of them and 20 others in the second: 60 remain; a harvest goes on where it was."""

    def dialogue(n):
        return [{"role": "user", "content": " ".join(f"w{i}" for i in range(10 * n, 10 * n + 10))}]

    for name, numbers in (("a", range(40)), ("b", range(20, 60))):
        lines = (json.dumps({"messages": dialogue(n)}) + "\n" for n in numbers)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    mix = [{"documents": str(tmp_path / "a.jsonl"), "weight": 3}, {"documents": str(tmp_path / "b.jsonl")}]
    recipe = recipe_of(chat_model, mix, "data.dedup=10", "source.tokens=100000")
    whole = harvest_only(recipe, tmp_path / "whole", silent)
    seen = {tuple(item.tolist()) for batch in whole.batches() for item in _items(batch)}
    held_out = 60 - len(seen)
    assert whole.n_items == len(seen)
    assert 0 <= held_out < 12
    assert recipe_of(chat_model, mix).data.dedup is None
    part = harvest_only(recipe_of(chat_model, mix, "data.dedup=10", "source.tokens=500"), tmp_path / "grown", silent)
    assert part.n_rows < whole.n_rows
    grown = harvest_only(recipe, tmp_path / "grown", silent)
    assert grown.n_rows == whole.n_rows
    assert all(torch.equal(a.input, b.input) for a, b in zip(grown.batches(), whole.batches()))
    again = Recipe.read(None, {"store": str(whole.folder)}, [*SMALL[:4], "evaluation=null"])
    Pipeline(again, tmp_path / "run", silent).run()
    assert (tmp_path / "run" / "dictionary" / "dictionary.safetensors").is_file()


def _items(batch):
    return batch.items.tokens.split(batch.items.offsets.diff().tolist())


def test_wrong_recipes(chat_model, tiny_model, files, tmp_path):
    with pytest.raises(UnweaveError, match="expected a data set"):
        recipe_of(chat_model, [])
    with pytest.raises(UnweaveError, match="weight"):
        recipe_of(chat_model, [{"documents": "x", "weight": 0}])
    with pytest.raises(UnweaveError, match="'text' or 'chat'"):
        recipe_of(chat_model, "x", "data.format=chats")
    with pytest.raises(UnweaveError, match="no chat template"):
        Pipeline(recipe_of(tiny_model, str(files / "a.jsonl")), tmp_path, silent).train()
