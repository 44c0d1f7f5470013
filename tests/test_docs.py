"""The documents are run: every Python block of the tour, in order, beside a small demo run on the real model."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

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


def test_the_pages_on_architectures_are_what_the_code_says():
    spec = importlib.util.spec_from_file_location("architecture_pages", ROOT / "docs" / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.pages()
    there = {"architectures.md", *(f"architectures/{path.name}" for path in ROOT.glob("docs/architectures/*.md"))}
    assert made.keys() == there, "run python docs/architectures.py"
    for name, text in made.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"{name}: run python docs/architectures.py"
