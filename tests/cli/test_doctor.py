"""``unweave doctor``: what this machine has, and which plan wins for a shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from unweave.cli._app import app
from unweave.errors import UnweaveError
from unweave.kernels import calibration
from unweave.kernels.backend import why_not

needs_numba = pytest.mark.skipif(why_not("cpu") is not None, reason="numba is not installed (pip install numba)")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="would time the CUDA device that is here")


@pytest.fixture(autouse=True)
def own_machine(tmp_path, monkeypatch):
    """A cache folder of the test's own, a wide terminal, and no plan pinned."""
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("UNWEAVE_KERNELS", raising=False)
    monkeypatch.setattr(calibration, "_known", {})


@pytest.fixture
def timings(monkeypatch):
    """Replaces the timing; holds the shapes that were asked for."""
    asked: list[tuple[Any, ...]] = []

    def measure(d, n_features, n_rows, purpose, device):
        asked.append((d, n_features, n_rows, purpose))
        return {"reference": 0.003, "cpu": 0.002, "cpu+screen": 0.001}

    monkeypatch.setattr(calibration, "measure", measure)
    return asked


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_it_names_the_machine_and_what_can_run_on_it(timings):
    done = doctor("24,100,64")
    assert done.exit_code == 0, done.output
    for words in (calibration.processor(), torch.__version__, "reference kernels", str(calibration.file())):
        assert words in done.output
    row = next(line for line in done.output.splitlines() if "gpu kernels" in line)
    assert "no CUDA device" in row


@needs_numba
def test_every_shape_is_timed_for_training_and_encoding_and_the_fastest_is_marked(timings):
    done = doctor("128,4096,2048", "256x8192x512")
    assert done.exit_code == 0, done.output
    shapes = [(128, 4096, 2048), (256, 8192, 512)]
    assert timings == [(*shape, purpose) for shape in shapes for purpose in ("train", "encode")]
    chosen = [line for line in done.output.splitlines() if "chosen" in line]
    assert len(chosen) == 4
    assert all("cpu, bfloat16 screen" in line and "1.0" in line for line in chosen)
    assert done.output.count("reference, exact float32") == 4


@needs_numba
def test_what_was_measured_is_kept_until_asked_again(timings):
    for arguments, n_asked in [([], 2), ([], 2), (["--again"], 4), ([], 4)]:
        done = doctor("128,4096,2048", *arguments)
        assert done.exit_code == 0, done.output
        assert len(timings) == n_asked


@needs_numba
def test_small_shapes_are_said_not_to_be_timed(timings):
    done = doctor("24,100,64")
    assert done.output.count("not timed") == 2
    assert not timings


@needs_numba
def test_a_pinned_plan_is_shown(timings, monkeypatch):
    monkeypatch.setenv("UNWEAVE_KERNELS", "cpu+screen")
    done = doctor("24,100,64")
    assert done.exit_code == 0, done.output
    assert done.output.count("cpu, bfloat16 screen") == 2
    monkeypatch.setenv("UNWEAVE_KERNELS", "warp")
    assert isinstance(doctor("24,100,64").exception, UnweaveError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="said of processors alone")
@pytest.mark.parametrize(("bfloat16", "whole"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_processor_without_any_fast_rough_product_is_told_so(bfloat16, whole, timings, monkeypatch):
    found = {**calibration.fingerprint(), "bfloat16": bfloat16, "int8": whole}
    monkeypatch.setattr(calibration, "fingerprint", lambda: found)
    done = doctor("24,100,64")
    assert done.exit_code == 0, done.output
    row = next(line for line in done.output.splitlines() if "fast int8" in line)
    assert ("yes" if whole else "no") in row
    assert ("slowly" in done.output) == (not bfloat16 and not whole)


@pytest.mark.parametrize("shape", ["24,100", "24,100,64,2", "a,b,c", "24,100,0", "-1,100,64", "1.5,2,3", ""])
def test_a_shape_that_is_none_is_a_usage_error(shape, timings):
    done = doctor("--", shape)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert "expected" in done.output
    assert not timings
