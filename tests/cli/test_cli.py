"""The command line as a user meets it: a whole run on a tiny model, and one sentence for every mistake."""

import contextlib
import io
import json
import os
import subprocess
import sys
from unittest import mock

import pytest

from unweave.cli import main

SMALL = ["--tokens", "3k", "--expansion", "4", "--k", "4", "source.context_size=32", "source.batch_tokens=256"]
SMALL += ["training.batch_size=128", "training.ring_rows=1024", "evaluation.tokens=600", "evaluation.loss_tokens=200"]
SMALL += ["evaluation.n_bootstrap=50"]


def alone(*arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "unweave", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def unweave(*arguments, cwd=None):
    """The same in this one, where nothing has to be imported again: with its status, output and errors."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd or os.curdir))
        stack.enter_context(mock.patch.object(sys, "argv", ["unweave", *map(str, arguments)]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(error))
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), error.getvalue())


@pytest.fixture(scope="module")
def run_folder(tiny_model, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = alone(
        "train", "--model", tiny_model, "--site", "layers.1", "--data", corpus, "--passes", "3", "--out", folder, *SMALL
    )
    assert done.returncode == 0, done.stderr
    assert "fvu" in done.stdout
    assert f"unweave open {folder}" in done.stderr
    return folder


def test_train_writes_a_whole_run_folder(run_folder):
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {"recipe.yaml", "dictionary", "metrics.jsonl", "evaluation.json", "features", "provenance.json"}
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    assert evaluation["metrics"]["fvu"]["value"] < evaluation["baselines"]["random"]["fvu"]["value"]
    provenance = json.loads((run_folder / "provenance.json").read_text())
    assert set(provenance["stages"]) == {"harvest", "train", "evaluate", "index"}
    assert provenance["source"]["site"] == "layers.1"
    assert provenance["versions"]["torch"]


def test_the_same_command_again_changes_nothing(run_folder, tiny_model, corpus):
    before = (run_folder / "dictionary" / "dictionary.safetensors").read_bytes()
    command = ["--model", tiny_model, "--site", "layers.1", "--data", corpus, "--passes", "3", "--out", run_folder]
    done = unweave("train", *command, *SMALL)
    assert done.returncode == 0, done.stderr
    assert (run_folder / "dictionary" / "dictionary.safetensors").read_bytes() == before
    other = unweave("train", *command, *SMALL, "training.lr=0.5")
    assert other.returncode == 2
    assert "begun with another recipe: training.lr is None there and 0.5 now" in other.stderr


def test_inspect_knows_every_folder(run_folder, tiny_model):
    for thing, word in [
        (run_folder, "batch_topk"),
        (run_folder / "dictionary", "n_features"),
        (run_folder / "activations", "layers.1"),
        (run_folder / "features", "feature store"),
        (tiny_model, "layers.3.mlp"),
    ]:
        done = unweave("inspect", thing)
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
    assert "every shard verified" in unweave("inspect", run_folder / "activations", "--verify").stdout
    assert "feature 3" in unweave("inspect", run_folder, "--feature", "3").stdout.lower()


def test_eval_and_index_again(run_folder):
    done = unweave("eval", run_folder, "--tokens", "400", "--loss-tokens", "100")
    assert done.returncode == 0, done.stderr
    assert "ce_loss_recovered" in done.stdout
    done = unweave("index", run_folder, "--tokens", "1k")
    assert done.returncode == 0, done.stderr


def test_export_writes_one_file_that_needs_nothing_else(run_folder, tmp_path):
    done = unweave("export", run_folder, "--feature", "1,3-4", "--out", tmp_path / "f.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "f.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page


def test_a_store_trains_several_dictionaries_without_naming_its_model_again(tiny_model, corpus, tmp_path):
    store = tmp_path / "store"
    small = ["source.context_size=32", "source.batch_tokens=256"]
    done = unweave(
        *("harvest", "--model", tiny_model, "--site", "layers.2.mlp", "--data", corpus, "--tokens", "2k"),
        *("--out", store, *small),
    )
    assert done.returncode == 0, done.stderr
    for arch, option in [("topk", ["--k", "4"]), ("jumprelu", ["--k", "4"]), ("relu", [])]:
        done = unweave(
            *("train", "--store", store, "--arch", arch, *option, "--out", tmp_path / arch, "--no-eval"),
            *("training.batch_size=128", "training.ring_rows=512", "--expansion", "2"),
        )
        assert done.returncode == 0, done.stderr
    done = unweave("inspect", tmp_path / "topk")
    assert "layers.2.mlp" in done.stdout


def test_several_sites_give_several_stores_and_int8_halves_them(tiny_model, corpus, tmp_path):
    stores = tmp_path / "stores"
    done = unweave(
        *("harvest", "--model", tiny_model, "--site", "layers.0", "--site", "layers.2:input", "--data", corpus),
        *("--tokens", "2k", "--dtype", "int8", "--out", stores, "source.context_size=32", "source.batch_tokens=256"),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in stores.iterdir()) == ["layers.0", "layers.2-input"]
    for line in (f"unweave train --store {stores / 'layers.0'}", f"--store {stores / 'layers.2-input'}"):
        assert line in done.stderr
    shown = unweave("inspect", stores / "layers.2-input", "--verify").stdout
    assert "int8 read as" in shown
    assert "layers.2:input" in shown
    done = unweave("harvest", "--model", tiny_model, "--site", "layers.0", "--data", corpus, "--dtype", "int4")
    assert done.returncode != 0
    assert "dtype: Input should be 'int8', found 'int4'" in done.stderr


def test_streaming_needs_no_store(tiny_model, corpus, tmp_path):
    done = unweave(
        *("train", "--model", tiny_model, "--site", "layers.1", "--data", corpus, "--stream", "--no-eval"),
        *("--out", tmp_path / "run", *SMALL),
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "activations").exists()
    assert (tmp_path / "run" / "features" / "manifest.json").is_file()


def test_a_transcoder_from_one_site_to_another(tiny_model, corpus, tmp_path):
    done = unweave(
        *("train", "--model", tiny_model, "--site", "layers.1.mlp:input", "--target-site", "layers.1.mlp"),
        *("--data", corpus, "--out", tmp_path / "run", *SMALL),
    )
    assert done.returncode == 0, done.stderr
    assert '"subtract_bias": false' in (tmp_path / "run" / "dictionary" / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--site", "layers.1", "--data", "x"], "model: Field required"),
        (["train", "--model", "/nowhere/at/all", "--site", "layers.1", "--data", "{corpus}"], "/nowhere/at/all"),
        (["train", "--model", "{model}", "--site", "layer.1", "--data", "{corpus}"], "no site 'layer.1'.*layers.1"),
        (["train", "--model", "{model}", "--site", "layers.1", "--data", "{empty}"], "empty"),
        (["train", "--model", "{model}", "--site", "layers.1", "--data", "{binary}"], "binary|UTF-8"),
        (["train", "--model", "{model}", "--site", "layers.1", "--data", "nothing.txt"], "nothing.txt"),
        (["train", "--model", "{model}", "--site", "layers.1", "--data", "{corpus}", "--arch", "top"], "'topk'"),
        (
            ["train", "--model", "{model}", "--site", "layers.1", "--data", "{corpus}", "data.fild=x"],
            "unknown key 'fild'",
        ),
        (["train", "missing.yaml"], "no recipe at missing.yaml"),
        (["train", "--store", "missing"], "missing"),
        (["open", "missing"], "no folder missing"),
        (["open", "{model}"], "is not a run"),
        (["eval", "missing"], "no recipe"),
        (["inspect", "{corpus}"], "neither a run"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(arguments, message, tiny_model, corpus, tmp_path):
    import re

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 40)
    places = {"model": tiny_model, "corpus": corpus, "empty": tmp_path / "empty.txt", "binary": tmp_path / "binary.txt"}
    done = unweave(*(str(a).format(**places) for a in arguments), cwd=tmp_path)  # a traceback would come out here
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("unweave: ")
    assert re.search(message, last), last


def test_help_names_every_verb_and_its_options():
    page = unweave("--help").stdout
    for verb in ("demo", "harvest", "train", "eval", "index", "open", "export", "inspect", "archs"):
        assert verb in page
        assert unweave(verb, "--help").returncode == 0
    assert unweave("--version").stdout.strip()
    listing = unweave("archs").stdout
    for arch in ("topk", "batch_topk", "jumprelu", "relu"):
        assert arch in listing


def test_ctrl_c_says_how_to_go_on(tiny_model, corpus, tmp_path):
    import signal
    import time

    command = [sys.executable, "-m", "unweave", "train", "--model", str(tiny_model), "--site", "layers.1"]
    command += ["--data", str(corpus), "--passes", "5000", "--out", str(tmp_path / "run"), *SMALL]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        log = tmp_path / "run" / "metrics.jsonl"
        for _ in range(600):
            if log.is_file() and log.stat().st_size:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command continues" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--tokens", "inf"], 2), (["--tokens", "nan"], 2), (["--tokens", "many"], 2)]
)
def test_odd_numbers_are_usage_errors(arguments, status):
    done = unweave("harvest", "--model", "m", "--site", "s", "--data", "d", *arguments)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
