"""A made-up English run (see ``english.py``) and clients for it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


def _load_english() -> Any:
    """``english.py`` lies beside this file; with importlib mode the folder is not on the path."""
    name = "unweave_test_english"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("english.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def english() -> Any:
    return _load_english()


@pytest.fixture(scope="session")
def english_corpus(english: Any) -> Any:
    return english.Corpus()


@pytest.fixture(scope="session")
def run_folder(english: Any, english_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return english.write_run(tmp_path_factory.mktemp("runs") / "english-relu", english_corpus)


@pytest.fixture
def run(english: Any, english_corpus: Any, run_folder: Path) -> Any:
    return english.EnglishRun(run_folder, english_corpus)


@pytest.fixture
def client(run: Any) -> Any:
    """A client that speaks as a browser on the same machine does."""
    from starlette.testclient import TestClient

    from unweave.web import create_app

    return TestClient(create_app(run), base_url="http://127.0.0.1:8765", follow_redirects=False)
