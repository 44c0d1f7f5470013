"""``unweave import-store`` and ``export-store``, in one process for speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave.cli._app import app
from unweave.errors import UnweaveError

GOLDEN = Path(__file__).parent.parent / "formats" / "stores" / "golden"


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_activations_are_inspected_imported_and_used(tmp_path: Path) -> None:
    shown = call("inspect", GOLDEN / "saelens" / "parquet")
    assert all(word in shown for word in ("SAELens", "model", "unknown", "layers.1", "72 of width 8, float32"))
    said = call("import-store", GOLDEN / "saev" / "two_layers", "--out", tmp_path / "s", "--option", "layer=11")
    assert "42 rows x 8 float32" in said
    assert "train on it with: unweave.fit(" in said
    assert "ViT-B-32/openai" in call("inspect", tmp_path / "s", "--verify")
    dictionary = unweave.fit(unweave.ActivationStore.open(tmp_path / "s"), arch="topk", n_features=12, k=2, epochs=2)
    unweave.formats.write(dictionary, "saelens", tmp_path / "sae")
    assert "as declared" in call("verify", tmp_path / "sae", "--store", tmp_path / "s", "--l0", 2)


def test_latents_are_opened_and_written(tmp_path: Path) -> None:
    call("import-store", GOLDEN / "delphi" / "raw" / "layers.1", "--out", tmp_path / "run")
    shown = call("inspect", tmp_path / "run")
    assert all(word in shown for word in ("none, imported codes", "delphi", "tiny", "layers.1"))
    assert "Feature 3: fires on" in call("inspect", tmp_path / "run", "--feature", 3)
    call("export", tmp_path / "run", "--feature", 3, "--out", tmp_path / "f.html")
    assert "Imported codes of 50 features" in (tmp_path / "f.html").read_text()
    said = call("export-store", tmp_path / "run", "--out", tmp_path / "raw", "--splits", 2, "--hookpoint", "h.1")
    assert "for delphi's LatentDataset(" in said
    assert "50 features over 384 tokens" in call("inspect", tmp_path / "raw" / "h.1")


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="say which, as layer="):
        call("import-store", GOLDEN / "saev" / "two_layers", "--out", tmp_path / "s")
    with pytest.raises(UnweaveError, match="takes no option 'folder'"):
        call("import-store", GOLDEN / "saelens" / "float32", "--out", tmp_path / "s", "--option", "folder=x")
    torch.save({"a": 1}, tmp_path / "a.pt")
    with pytest.raises(UnweaveError, match="holds no store in a format"):
        call("import-store", tmp_path, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()
