"""``unweave sweep``: a grid of run folders from one store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from unweave.activations import ActivationStore
from unweave.batch import ActivationBatch
from unweave.cli._app import app
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import read_tensors
from unweave.runs.recipe import Recipe
from unweave.workflows.sweep import sweep as run_sweep

SMALL = ["training.batch_size=64", "training.ring_rows=256", "training.engine=reference", "--passes", "2"]
GRID = ["--arch", "topk,batch_topk", "--k", "2,4", "--n-features", "48"]
NAMES = {f"{arch}-n_features48-k{k}" for arch in ("topk", "batch_topk") for k in (2, 4)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Random rows, in a store that says where they come from as one of ``unweave harvest`` does."""
    folder = tmp_path_factory.mktemp("sweep") / "store"
    made_with = {"model": {"name": "nobody"}, "data": {"documents": "nowhere"}, "source": {"site": "layers.1"}}
    store = ActivationStore.create(folder, {"kind": "array", "recipe": made_with}, d_in=16, dtype="float32")
    g = torch.Generator().manual_seed(0)
    rows = (torch.rand(700, 30, generator=g) < 0.1).float() @ torch.randn(30, 16, generator=g)
    store.append(ActivationBatch.of_rows(rows, None, 0))
    store.finish()
    return folder


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def sweep(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def refused(*arguments: Any) -> str:
    """The sentence with which the command line ends, or that of a usage error."""
    done = sweep(*arguments)
    if isinstance(done.exception, UnweaveError):
        return str(done.exception)
    assert done.exit_code == 2, done.output
    return done.output


@pytest.fixture(scope="module")
def grid(store, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("sweep") / "out"
    done = sweep("--store", store, *GRID, "--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    return out, done.output


def test_every_combination_gets_a_run_folder(grid, store):
    out, _ = grid
    assert {path.name for path in out.iterdir() if path.is_dir()} == NAMES
    for name in NAMES:
        recipe = Recipe.of_run(out / name)
        arch, k = name.split("-")[0], int(name[-1])
        assert (recipe.dictionary.arch, recipe.dictionary.options) == (arch, {"k": k})
        assert recipe.store == str(store)
        assert json.loads((out / name / "training.json").read_text())["config"]["n_rows"] == 1400
        assert (out / name / "provenance.json").is_file()
        dictionary = Dictionary.load(out / name / "dictionary")
        assert (dictionary.name, dictionary.n_features, dictionary.config.k) == (arch, 48, k)


def test_the_table_has_a_line_for_each_with_the_best_first(grid):
    out, output = grid
    lines = [line for line in output.splitlines() if any(f" {name} " in line for name in NAMES)]
    assert len(lines) == 4
    fvu = [float(line.split("│")[2]) for line in lines]
    assert fvu == sorted(fvu)
    assert "k4" in lines[0]  # more features a row reconstruct better
    assert f"4 runs written to {out}" in output


def test_the_same_command_again_reads_the_grid_back(grid, store):
    out, _ = grid
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("dictionary.safetensors")}
    done = sweep("--store", store, *GRID, "--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in out.rglob("dictionary.safetensors")} == weights
    assert len(weights) == 4
    assert "begun with another recipe" in refused("--store", store, *GRID, "--out", out, *SMALL, "training.lr=0.5")


def test_a_sweep_that_was_stopped_goes_on(grid, store, tmp_path, monkeypatch):
    from unweave.training import many

    save, calls = many._Grid.save, iter(range(1, 100))

    def stopping(self):
        save(self)
        if next(calls) == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    command = ["--store", store, *GRID, "--out", out, *SMALL, "training.checkpoint_every=5"]
    with monkeypatch.context() as patched:
        patched.setattr(many._Grid, "save", stopping)
        assert sweep(*command).exit_code == 130
    assert (out / "checkpoints" / "latest.safetensors").is_file()
    assert not list(out.rglob("training.json"))
    done = sweep(*command)
    assert done.exit_code == 0, done.output
    for name in NAMES:
        a, b = (read_tensors(folder / name / "dictionary" / "dictionary.safetensors") for folder in (out, grid[0]))
        assert all(torch.equal(a[part], b[part]) for part in a)


def test_rates_and_seeds_are_axes_too(store, tmp_path):
    out = tmp_path / "out"
    done = sweep(
        "--store", store, "--lr", "1e-3,3e-4", "--seed", "0,1", "--out", out, *SMALL, "dictionary.n_features=40"
    )
    assert done.exit_code == 0, done.output
    names = {f"lr{lr}-seed{seed}" for lr in ("0.001", "0.0003") for seed in (0, 1)}
    assert {path.name for path in out.iterdir() if path.is_dir()} == names
    assert Recipe.of_run(out / "lr0.0003-seed1").training.lr == 3e-4
    first = [read_tensors(out / name / "dictionary" / "dictionary.safetensors")["W_dec"] for name in sorted(names)]
    assert len({float(W.sum()) for W in first}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give values of at least one of arch, n_features, k, lr, seed"),
        (["--k", "2,2"], "k needs values that differ"),
        (["--k", "2,x"], "--k: expected numbers separated by commas, found '2,x'"),
        (["--n-features", "many"], "expected a number such as 500k"),
        (["--arch", "topk,tpok"], "no architecture 'tpok'"),
        (["--arch", "topk,relu", "--k", "2"], "relu takes no k: its sparsity follows from other options"),
        (["--k", "2,5000"], "k must be at most n_features"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(arguments, message, store, tmp_path):
    out = tmp_path / "out"
    assert message in refused("--store", store, *arguments, "--out", out, *SMALL, "dictionary.n_features=48")
    assert not out.exists() or not list(out.rglob("training.json"))


def test_a_store_that_is_not_there_is_named(tmp_path):
    assert "nothing-here" in refused("--store", tmp_path / "nothing-here", *GRID, "--out", tmp_path / "out", *SMALL)


def test_an_unknown_axis_is_refused_with_the_known_ones(store, tmp_path):
    recipe = Recipe.read(None, {"store": str(store)}, [])
    with pytest.raises(UnweaveError, match="no axis 'width'; there are arch, n_features, k, lr, seed"):
        run_sweep(recipe, {"width": [1]}, tmp_path)


def test_long_numbers_keep_their_names_apart(store, tmp_path):
    recipe = Recipe.read(None, {"store": str(store)}, [s for s in SMALL if "=" in s] + ["dictionary.n_features=40"])
    seeds = [12345678, 12345679]
    assert len(run_sweep(recipe, {"seed": seeds, "k": [2]}, tmp_path, say=lambda line: None)) == 2
