"""The package as a whole: light to import, few requirements, rooms in order."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unweave

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "unweave"
# DESIGN's rooms from the ground up: a room imports rooms above it in this list, never one below.
ROOMS = [
    *("errors", "files", "config", "progress", "kernels", "codes", "batch", "metrics", "dictionaries", "sources"),
    *("interventions", "activations", "training", "formats", "features", "evaluation", "analysis", "runs"),
    *("workflows", "web", "cli", "testing"),
]
HEAVY = ("transformers", "fastapi", "pyarrow", "sklearn", "scipy", "jinja2", "pandas", "datasets", "tokenizers")


def test_import_costs_at_most_torch_and_a_little():
    """Processor time, which a busy machine does not stretch; the smallest of several tries."""
    script = (
        "import time, sys; import torch; t = time.process_time(); import unweave; "
        "unweave.SparseCode, unweave.UnweaveError, unweave.load, unweave.Dictionary; "
        "print(time.process_time() - t); print(*sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
        for _ in range(4)
    ]
    assert min(float(seconds) for seconds, _ in runs) <= 0.3
    loaded = set(runs[0][1].split())
    assert not loaded & set(HEAVY)


def test_import_alone_does_not_even_load_torch():
    script = "import sys, unweave; assert 'torch' not in sys.modules; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_at_most_twelve_required_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) <= 12
    assert project["version"] == unweave.__version__


@pytest.mark.parametrize("name", [n for n in unweave.__all__ if n != "__version__"])
def test_every_public_name_is_there_and_documented(name):
    assert getattr(unweave, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = unweave.nonsense


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unweave."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("unweave.")}
    return found


def test_rooms_import_only_rooms_above_them():
    for path in SRC.rglob("*.py"):
        room = path.relative_to(SRC).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        assert room in ROOMS, f"{path} is in no room"
        below = [r for r in rooms_imported(path) if r != room and ROOMS.index(r) > ROOMS.index(room)]
        assert not below, f"{path} imports from below: {below}"


def test_no_file_is_long():
    long = [str(p) for p in SRC.rglob("*.py") if len(p.read_text().splitlines()) > 500]
    assert not long
