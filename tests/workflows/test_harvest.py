"""Harvests for the command line: stores of several sites, int8 stores, and training from either."""

import pytest

from unweave.activations import ActivationStore
from unweave.errors import UnweaveError
from unweave.runs.recipe import Recipe
from unweave.workflows import Pipeline, harvest_only, harvest_sites

SMALL = {"training": {"batch_size": 128, "ring_rows": 512}, "evaluation": None, "index": None}


def recipe_of(tiny_model, corpus, **source):
    values = {
        "model": {"name": str(tiny_model)},
        "data": {"documents": str(corpus)},
        "source": {"site": "layers.1", "tokens": 1500, "context_size": 32, "batch_tokens": 256, **source},
        "dictionary": {"arch": "topk", "expansion": 2, "options": {"k": 4}},
    }
    return Recipe.from_dict({**values, **SMALL})


def silent(line: str) -> None:
    """No word."""


def test_each_site_gets_a_store_one_can_train_from(tiny_model, corpus, tmp_path):
    said = []
    stores = harvest_sites(recipe_of(tiny_model, corpus), ["layers.1", "layers.2:input"], tmp_path / "s", said.append)
    assert [store.folder.name for store in stores.values()] == ["layers.1", "layers.2-input"]
    assert sum(line.startswith("site: ") for line in said) == 2
    for site, store in stores.items():
        alone = harvest_only(recipe_of(tiny_model, corpus, site=site), tmp_path / "alone" / store.folder.name, silent)
        assert alone.manifest == store.manifest
        recipe = Recipe.read(None, {"store": str(store.folder), **SMALL}, [])
        assert recipe.source.site == site
    run = Pipeline(recipe, tmp_path / "run", silent)
    run.run()
    assert (tmp_path / "run" / "dictionary" / "config.json").is_file()


def test_a_store_is_not_also_a_folder_of_stores(tiny_model, corpus, tmp_path):
    harvest_only(recipe_of(tiny_model, corpus), tmp_path, silent)
    with pytest.raises(UnweaveError, match="is a store itself"):
        harvest_sites(recipe_of(tiny_model, corpus), ["layers.1", "layers.2"], tmp_path, silent)


def test_an_int8_store_trains_and_knows_that_it_is_one(tiny_model, corpus, tmp_path):
    store = harvest_only(recipe_of(tiny_model, corpus, dtype="int8"), tmp_path / "int8", silent)
    assert store.manifest.dtype == "int8"
    plain = harvest_only(recipe_of(tiny_model, corpus), tmp_path / "plain", silent)
    assert plain.provenance == {k: v for k, v in store.provenance.items() if k != "stored"}
    recipe = Recipe.read(None, {"store": str(store.folder), **SMALL}, [])
    assert recipe.source.dtype == "int8"
    Pipeline(recipe, tmp_path / "run", silent).run()
    with pytest.raises(UnweaveError, match=r"harvested with source.dtype None, not 'int8'"):
        Recipe.read(None, {"store": str(plain.folder), "source": {"dtype": "int8"}}, [])


def test_a_run_may_keep_its_own_activations_as_int8(tiny_model, corpus, tmp_path):
    recipe = recipe_of(tiny_model, corpus, dtype="int8")
    Pipeline(recipe, tmp_path, silent).run()
    assert ActivationStore.open(tmp_path / "activations").manifest.dtype == "int8"
    with pytest.raises(UnweaveError, match=r"source.dtype is 'int8' there and None now"):
        Pipeline(recipe_of(tiny_model, corpus), tmp_path, silent)
    with pytest.raises(UnweaveError, match="with stream there is no store"):
        recipe_of(tiny_model, corpus, dtype="int8", stream=True)
