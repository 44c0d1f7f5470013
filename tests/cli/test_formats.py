"""``unweave inspect`` and ``unweave convert`` on other libraries' checkpoints, in one process for speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave.cli._app import app
from unweave.errors import UnweaveError
from unweave.runs import Run

GOLDEN = Path(__file__).parent.parent / "formats" / "golden"


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("saelens/topk", ["saelens", "topk", "24", "gpt2", "layers.3", "loads"]),
        ("saelens/gated", ["gated", "no: SAELens's gated needs the architecture"]),
        ("sparsify/random/layers.3", ["sparsify", "model", "unknown"]),
        ("dictionary_learning/trained_BatchTopKSAE/ae.pt", ["dictionary_learning", "batch_topk"]),
    ],
)
def test_inspect_prints_a_card(case: str, words: list[str]) -> None:
    shown = call("inspect", GOLDEN / case)
    assert all(word in shown for word in words), shown


def test_convert_writes_what_another_library_reads(tmp_path: Path) -> None:
    call("convert", GOLDEN / "saelens" / "topk", "--to", "sparsify", "--out", tmp_path / "out")
    x = torch.randn(20, 8)
    one, other = unweave.load(GOLDEN / "saelens" / "topk"), unweave.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-5)


def test_convert_takes_what_the_files_do_not_say(tmp_path: Path) -> None:
    state = GOLDEN / "overcomplete" / "random_topk" / "sae.pt"
    command = ["convert", state, "--to", "saelens", "--out", tmp_path / "out", "--option", "arch=topk"]
    call(*command, "--option", "k=4")
    assert "topk" in call("inspect", tmp_path / "out")


def test_convert_refuses_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="sparsify cannot express the activation 'relu'"):
        call("convert", GOLDEN / "saelens" / "standard", "--to", "sparsify", "--out", tmp_path / "out")
    with pytest.raises(UnweaveError, match="no format 'saelenz'"):
        call("convert", GOLDEN / "saelens" / "standard", "--to", "saelenz", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_converted(tmp_path: Path) -> None:
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    unweave.fit(rows, arch="topk", n_features=16, k=2, epochs=2, batch_size=64, folder=tmp_path / "run")
    assert isinstance(unweave.load(tmp_path / "run"), Run)
    call("convert", tmp_path / "run", "--to", "dictionary_learning", "--out", tmp_path / "out")
    with pytest.raises(UnweaveError, match="is a run, which says all of itself: leave k out"):
        unweave.load(tmp_path / "run", k=4)
    with pytest.raises(UnweaveError, match="no run but a checkpoint: model and force"):
        unweave.load(tmp_path / "out", force=True)
    with torch.no_grad():
        found = unweave.load(tmp_path / "out")(rows)
        torch.testing.assert_close(found, unweave.load(tmp_path / "run" / "dictionary")(rows), rtol=1e-4, atol=1e-5)
