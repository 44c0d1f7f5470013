"""What unweave writes, the libraries load and compute the same; skipped for a library that is not installed."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from unweave import formats
from unweave.errors import UnweaveError


def _script() -> ModuleType:
    path = Path(__file__).parent / "golden" / "check_written.py"
    spec = importlib.util.spec_from_file_location("check_written", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITTEN = _script()


# Measured with sae-lens 6.54.12, dictionary-learning 0.1.0, eai-sparsify 1.3.3 and llamascopium 2.0.0b34: at most 1e-7.
@pytest.mark.parametrize("library", sorted(WRITTEN.LIBRARIES))
def test_the_library_computes_the_same(library: str) -> None:
    if find_spec(WRITTEN.LIBRARIES[library][0]) is None:
        pytest.skip(f"{library} is not installed here; golden/check_written.py runs this where it is")
    WRITTEN.check(library)


@pytest.mark.parametrize("format", [f for f in formats.writable() if f != "unweave"])
def test_unweave_reads_back_what_it_writes(format: str, tmp_path: Path) -> None:
    written = 0
    for name, dictionary in WRITTEN.dictionaries().items():
        with suppress(UnweaveError):
            formats.write(dictionary, format, tmp_path / name, WRITTEN.FACTS)
        if not (tmp_path / name).exists():
            continue
        folder = tmp_path / name
        again, x = formats.load(folder), WRITTEN.rows()
        with torch.no_grad():
            torch.testing.assert_close(again.encode(x).dense(), dictionary.encode(x).dense(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(again(x), dictionary(x), rtol=1e-4, atol=1e-5)
        assert formats.inspect(folder).format == format
        written += 1
    assert written >= {"circuit-tracer-clt": 2, "crosscoder": 2, "llamascopium-crosscoder": 1}.get(format, 3)


def test_a_dictionary_that_would_compute_something_else_is_not_written(tmp_path: Path) -> None:
    dictionary = WRITTEN.dictionaries()["relu"]
    dictionary.activate = lambda values, pattern: values * 2  # an activation that its rule does not tell of
    with pytest.raises(UnweaveError, match="computes something else"):
        formats.write(dictionary, "saelens", tmp_path / "out")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(UnweaveError, match="not empty"):
        formats.write(WRITTEN.dictionaries()["topk"], "saelens", tmp_path)


def test_a_format_that_is_only_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=r"does not write it; it writes .*saelens"):
        formats.write(WRITTEN.dictionaries()["topk"], "openai", tmp_path / "out")
