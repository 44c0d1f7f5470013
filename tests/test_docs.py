"""The documents are run: every Python block of the tour, in order, beside a small demo run on the real model."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def blocks(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.real
@pytest.mark.slow
def test_the_tour_runs(demo_run, tmp_path, monkeypatch):
    shutil.copytree(demo_run, tmp_path / "unweave-demo", ignore=shutil.ignore_patterns("activations"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(blocks(ROOT / "docs" / "tour.md")):
        exec(compile(block, f"docs/tour.md, block {number}", "exec"), names)


def test_every_link_in_the_documents_leads_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_catalogue_is_made_of_a_list_of_releases(tmp_path):
    gemma, llama = "google/gemma-scope-2b-pt-res", "fnlp/Llama-Scope-R1-Distill"
    places = [f"layer_{i}/width_16k/average_l0_71" for i in range(3)]
    releases = {
        "a": {"repo_id": gemma, "conversion_func": "gemma_2", "saes": [{"path": place} for place in places]},
        "b": {
            "repo_id": llama,
            "conversion_func": "llama_scope_r1_distill",
            "saes": [{"path": f"x/L{i}R", "norm_scaling_factor": 32.0 / (i + 1)} for i in range(2)],
        },
        "c": {"repo_id": "somebody/unknown", "saes": [{"path": "blocks.0.hook_resid_pre"}]},
    }
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(releases))
    made = script("catalogue").from_list(tmp_path / "list.yaml", "1.2.3")
    assert made["listed"].startswith("sae-lens 1.2.3, ")
    assert made["repositories"][gemma] == {"files": ["layer_{0..2}/width_16k/average_l0_71/params.npz"]}
    assert made["options"][llama] == {"norm": {"x/L{0,1}R": [2.0, 4.0]}}
    assert "somebody/unknown" not in made["repositories"]


def test_the_pages_on_architectures_are_what_the_code_says():
    made = script("architectures").pages()
    there = {"architectures.md", *(f"architectures/{path.name}" for path in ROOT.glob("docs/architectures/*.md"))}
    assert made.keys() == there, "run python docs/architectures.py"
    for name, text in made.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"{name}: run python docs/architectures.py"
