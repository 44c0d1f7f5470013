"""``unweave inspect``, ``convert`` and ``verify`` on other libraries' checkpoints, in one process for speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import unweave
from unweave import formats
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
        ("saelens/gated", ["gated", "loads", "yes"]),
        ("saelens/jumprelu_layer_norm", ["standardised_jumprelu", "loads", "yes"]),
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


def test_a_format_that_names_the_layer_wants_to_know_it(tmp_path: Path) -> None:
    unweave.build("relu", 8, 16).eval().save(tmp_path / "made")
    for to in ("circuit-tracer", "llamascopium"):
        with pytest.raises(UnweaveError, match="say "):
            call("convert", tmp_path / "made", "--to", to, "--out", tmp_path / to)
        assert not (tmp_path / to).exists()
        call("convert", tmp_path / "made", "--to", to, "--out", tmp_path / to, "--site", "layers.5", "--model", "gpt2")
        assert formats.inspect(tmp_path / to).site == "layers.5"
    config = (tmp_path / "circuit-tracer" / "config.yaml").read_text()
    assert "feature_input_hook: hook_resid_post\nfeature_output_hook: hook_resid_post" in config
    assert formats.inspect(tmp_path / "circuit-tracer").model == "gpt2"


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


def test_verify_compares_and_names_the_site(tmp_path: Path) -> None:
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    dictionary = unweave.fit(rows, arch="batch_topk", n_features=16, k=2, epochs=2, batch_size=64)
    unweave.formats.write(dictionary, "saelens", tmp_path / "sae")
    for name, some in (("here", rows), ("before", 0.3 * rows.roll(1, dims=1))):
        unweave.harvest(unweave.ArraySource(some), tmp_path / name, n_rows=400)
    with torch.no_grad():
        l0 = float(dictionary.encode(rows).l0().float().mean())
    command = ["verify", tmp_path / "sae", "--l0", l0, "--tokens", 400, "--store"]
    shown = call(*command, tmp_path / "here")
    assert "as declared" in shown
    assert f"{l0:.4g}" in shown
    wrong = [str(a) for a in (*command, tmp_path / "before", "--other", tmp_path / "here")]
    result = CliRunner().invoke(app, wrong)
    assert result.exit_code == 1
    assert "not as declared: the rows are of another site" in result.output
    with pytest.raises(UnweaveError, match="something to compare with"):
        call("verify", tmp_path / "sae", "--store", tmp_path / "here")
