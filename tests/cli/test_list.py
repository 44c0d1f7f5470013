"""``unweave list``, and ``unweave inspect`` of a name from it, in one process for speed."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from unweave.cli import list as verb
from unweave.cli._app import app
from unweave.errors import UnweaveError
from unweave.formats import registry
from unweave.formats._checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_without_a_pattern_repositories_are_listed() -> None:
    result = call("list")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["fnlp/Llama3_1-8B-Base-LXR-8x", "32", "meta-llama/Llama-3.1-8B", "llama-scope"] in lines
    assert "listed by sae-lens" in result.stderr
    assert "known besides, but not listed yet: EleutherAI/" in result.stderr


def test_a_table_of_what_fits() -> None:
    result = call("list", "gemma-scope-2b-pt-res", "layer=12", "l0=82")
    header, row = result.stdout.splitlines()
    assert header.split() == ["name", "width", "L0", "k", "site", "model", "format"]
    name = "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    assert row.split() == [name, "16,384", "82", "-", "layers.12", "google/gemma-2-2b", "gemma-scope"]
    assert "1 dictionary in 1 repository, listed by sae-lens" in result.stderr


def test_long_tables_are_cut_and_say_so() -> None:
    result = call("list", "qwen-scope")
    assert len(result.stdout.splitlines()) == 1 + verb.SHOWN
    assert f"{verb.SHOWN} of them are shown: --limit 0 shows all" in result.stderr
    assert len(call("list", "qwen-scope", "--limit", "0").stdout.splitlines()) == 1 + 544
    assert len(call("list", "qwen-scope", "--limit", "3").stdout.splitlines()) == 1 + 3


def test_a_terminal_cuts_columns_and_no_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    name, model = "repository/layer_12/width_16k", "somebody/with-a-rather-long-name"
    verb._print(["name", "width", "model"], 2, [(name, "16,384", model), ("short", "8", "m")])
    _, first, second = capsys.readouterr().out.splitlines()
    assert name in first
    assert "16,384" in first
    assert model not in first
    assert "…" in first
    assert second.split() == ["short", "8", "m"]


def test_json_is_all_of_it() -> None:
    found = json.loads(call("list", "Llama-Scope-R1-Distill", "--json").stdout)
    assert len(found) == 96
    assert found[0]["hub_id"].startswith("fnlp/Llama-Scope-R1-Distill/0-Slimpajama")
    assert found[0]["options"] == {"norm": pytest.approx(1.178446)}
    assert found[0]["facts_from"] == {"model": "list", "site": "name", "layer": "name"}
    assert len(json.loads(call("list", "--json", "--limit", "2").stdout)) == 2


def test_nothing_fits() -> None:
    with pytest.raises(UnweaveError, match="no dictionary fits gema: 'gema' fits none: did you mean 'gemma'"):
        call("list", "gema")


def test_refresh_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UnweaveError, match="the hub cannot be reached"):
        call("list", "--refresh")


def test_inspect_takes_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = json.loads(call("list", "goodfire 3.1-8b", "--json").stdout)[0]["name"]
    assert "/" not in name
    folder = tmp_path / "Goodfire" / name
    folder.mkdir(parents=True)
    w = {"encoder_linear.weight": torch.randn(24, 8), "encoder_linear.bias": torch.zeros(24)}
    w |= {"decoder_linear.weight": torch.randn(8, 24), "decoder_linear.bias": torch.zeros(8)}
    torch.save(w, folder / f"{name}.pth")
    monkeypatch.setattr(registry, "on_hub", lambda hub_id: nullcontext(Checkpoint(tmp_path / hub_id, hub_id)))
    shown = call("inspect", name).stdout
    assert all(word in shown for word in ("goodfire", "meta-llama/Llama-3.1-8B-Instruct", "layers.19", "yes")), shown
    with pytest.raises(UnweaveError, match="the catalogue has no such dictionary: did you mean"):
        call("inspect", "qwen3-4b-transcoders/layer_99")
