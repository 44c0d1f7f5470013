"""Which plan is chosen, and what is remembered of the timing. No test here looks at how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unweave.errors import UnweaveError
from unweave.kernels import calibration, int8, multiply
from unweave.kernels.backend import backend, fastest, serves, why_not
from unweave.kernels.calibration import fingerprint, measured, plan_for
from unweave.kernels.names import PINS
from unweave.kernels.workspace import Plan, plan_of

needs_numba = pytest.mark.skipif(why_not("cpu") is not None, reason="numba is not installed (pip install numba)")
CPU = torch.device("cpu")
LARGE = torch.zeros(4096, 128)  # an encoder large enough to be timed
TIMES = {"reference": 5.0, "cpu+torch": 4.0, "cpu+onednn": 3.0, "cpu+numpy": 2.0, "cpu+screen": 1.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of each test's own; what other tests have learned is out of sight."""
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNWEAVE_KERNELS", raising=False)
    monkeypatch.setattr(calibration, "_known", {})
    return tmp_path / "cache"


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replaces the timing by numbers that make the screen win, before numpy; holds what was asked for."""
    asked: list[tuple[Any, ...]] = []

    def measure(*arguments: Any) -> dict[str, float]:
        asked.append(arguments)
        return dict(TIMES)

    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setattr(multiply, "why_not", lambda library: None)  # whatever this machine has
    return asked


def forget_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would find it."""
    monkeypatch.setattr(calibration, "_known", {})


@pytest.mark.parametrize("name", [name for name in PINS if not name.startswith("gpu")])
def test_the_environment_pins_a_plan(name, monkeypatch, timings):
    if reason := plan_of(name).why_not():
        pytest.skip(reason)
    monkeypatch.setenv("UNWEAVE_KERNELS", name)
    plan = plan_for(LARGE, 2048, "train")
    assert plan == (Plan("cpu", library="numpy") if name == "cpu" else plan_of(name))
    assert len(timings) == (name == "cpu")


@needs_numba
def test_the_cpu_pin_leaves_the_library_open(timings, monkeypatch):
    """The fastest of those that multiply in float32; nothing is timed again for it."""
    plan_for(LARGE, 2048, "train")
    assert plan_for(LARGE, 2048, "train", "cpu") == Plan("cpu", library="numpy")
    assert plan_for(LARGE, 2048, "train", "cpu+torch") == Plan("cpu")
    assert len(timings) == 1
    assert plan_for(torch.zeros(100, 24), 2048, "train", "cpu") == Plan("cpu")
    monkeypatch.setenv("UNWEAVE_KERNELS", "cpu+screen")
    assert plan_for(LARGE, 2048, "train", "cpu") == Plan("cpu", library="numpy")
    assert plan_for(LARGE.double(), 2048, "train", "cpu") == Plan()
    monkeypatch.setattr(calibration, "measure", lambda *_: {"reference": 1.0})
    assert plan_for(LARGE, 2048, "encode", "cpu") == Plan("cpu")


@needs_numba
def test_a_library_that_was_timed_and_is_gone_is_not_chosen(timings, monkeypatch):
    plan_for(LARGE, 2048, "train")
    monkeypatch.setattr(multiply, "why_not", lambda library: "gone" if library == "numpy" else None)
    assert plan_for(LARGE, 2048, "train", "cpu") == Plan("cpu", library="onednn")


@pytest.mark.parametrize("name", ["fast", "screen", "cpu+", "CPU", "cpu+screen+screen"])
def test_an_unknown_pin_is_refused_with_the_known_ones(name, monkeypatch):
    monkeypatch.setenv("UNWEAVE_KERNELS", name)
    with pytest.raises(
        UnweaveError,
        match=r"expected one of reference, cpu, cpu\+torch, cpu\+numpy, .* "
        r"cpu\+screen, cpu\+int8_screen, cpu\+bfloat16, gpu, .* found",
    ):
        plan_for(LARGE, 2048)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_pin_that_cannot_run_here_says_why(monkeypatch):
    monkeypatch.setenv("UNWEAVE_KERNELS", "gpu")
    with pytest.raises(UnweaveError, match="'gpu' cannot be used here: no CUDA device"):
        plan_for(LARGE, 2048)


@needs_numba
def test_int8_is_refused_with_the_reason_where_it_cannot_work(monkeypatch):
    monkeypatch.setattr(int8, "why_not", lambda: "the processor has no VNNI")
    with pytest.raises(UnweaveError, match=r"'cpu\+int8_screen' cannot be used here: the processor has no VNNI"):
        plan_for(LARGE, 2048, "train", "cpu+int8_screen")
    monkeypatch.setattr(int8, "why_not", lambda: None)
    assert plan_for(LARGE, 2048, "train", "cpu+int8_screen") == Plan("cpu", "int8_screen")
    long = torch.zeros(1, int8.LONGEST + 1)
    assert plan_for(long, 2048, "train", "cpu+int8_screen") == Plan()
    assert "more than 131,072 numbers (131,073) do not add up" in str(plan_of("cpu+int8_screen").why_not(len(long[0])))


@needs_numba
def test_int8_is_taken_only_where_it_can_work(timings, monkeypatch):
    monkeypatch.setitem(TIMES, "cpu+int8_screen", 0.5)
    monkeypatch.setattr(int8, "why_not", lambda: None)
    assert plan_for(LARGE, 2048, "train") == Plan("cpu", "int8_screen")
    monkeypatch.setattr(int8, "why_not", lambda: "gone")
    assert plan_for(LARGE, 2048, "train") == Plan("cpu", "screen")


@needs_numba
def test_a_pin_gives_way_where_it_cannot_hold(monkeypatch):
    monkeypatch.setenv("UNWEAVE_KERNELS", "cpu+screen")
    assert plan_for(LARGE.double(), 2048) == Plan("reference")
    assert plan_for(LARGE, 2048) == Plan("cpu", "screen")


def test_compiled_kernels_take_float32_on_their_own_device():
    for name in ("cpu", "gpu"):
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            assert not serves(name, LARGE.to(dtype))
    assert not serves("gpu", LARGE)
    assert serves("reference", LARGE.double())
    assert serves("cpu", LARGE) == (why_not("cpu") is None)
    assert fastest(LARGE.double()) is backend("reference")


@needs_numba
def test_the_fastest_plan_is_taken_and_remembered(timings, own_cache, monkeypatch):
    assert plan_for(LARGE, 2048, "train") == Plan("cpu", "screen")
    assert timings == [(128, 4096, 2048, "train", CPU)]
    assert plan_for(LARGE, 2048, "train") == Plan("cpu", "screen")
    forget_in_memory(monkeypatch)
    assert plan_for(LARGE, 2048, "train") == Plan("cpu", "screen")
    assert len(timings) == 1
    assert measured(LARGE, 2048, "train") == TIMES
    (file,) = own_cache.iterdir()
    assert file == calibration.file()
    assert json.loads(file.read_text())["machine"] == json.loads(json.dumps(fingerprint()))


@needs_numba
def test_shapes_within_a_factor_of_two_share_and_others_do_not(timings):
    cases: list[tuple[torch.Tensor, int, calibration.Purpose, int]] = [
        (LARGE, 2048, "train", 1),
        (torch.zeros(3000, 100), 1500, "train", 1),
        (LARGE, 2048, "encode", 2),
        (LARGE, 2049, "train", 3),
        (torch.zeros(4097, 128), 2048, "train", 4),
        (torch.zeros(4096, 129), 2048, "train", 5),
        (LARGE, 2048, "encode", 5),
    ]
    for W, n_rows, purpose, n_asked in cases:
        plan_for(W, n_rows, purpose)
        assert len(timings) == n_asked
    assert measured(LARGE, 17, "encode") == {}


@needs_numba
def test_small_encoders_and_small_batches_are_not_timed(timings, own_cache):
    assert plan_for(torch.zeros(100, 24), 10**6, "train") == Plan("cpu")
    assert plan_for(LARGE, 16) == Plan("cpu")
    assert plan_for(LARGE.double(), 2048) == Plan("reference")
    assert not timings
    kept = json.loads(calibration.file().read_text())["seconds"]
    assert set(kept) == {"train cpu compiled", "encode cpu compiled"}  # so the first use's wait is explained once


@needs_numba
@pytest.mark.parametrize(
    "broken", ["", "{", "[]", "{}", "null", '{"machine": {}}', '{"seconds": {"train cpu": 1}}', "\xff"]
)
def test_a_broken_cache_is_measured_anew(broken, timings, monkeypatch):
    plan_for(LARGE, 2048)
    calibration.file().write_text(broken, encoding="latin-1")
    forget_in_memory(monkeypatch)
    assert plan_for(LARGE, 2048) == Plan("cpu", "screen")
    assert len(timings) == 2
    forget_in_memory(monkeypatch)
    plan_for(LARGE, 2048)
    assert len(timings) == 2


@needs_numba
@pytest.mark.parametrize("odd", [None, [], {}, {"warp": 1.0}, 7, {"cpu": "soon"}, {"cpu": None}])
def test_an_entry_that_makes_no_sense_is_measured_anew(odd, timings, monkeypatch):
    plan_for(LARGE, 2048)
    values = json.loads(calibration.file().read_text())
    values["seconds"] = dict.fromkeys(values["seconds"], odd)
    calibration.file().write_text(json.dumps(values))
    forget_in_memory(monkeypatch)
    assert plan_for(LARGE, 2048) == Plan("cpu", "screen")
    assert len(timings) == 2


@needs_numba
def test_forgetting_removes_the_file_and_what_is_in_memory(timings):
    calibration.forget()  # nothing there yet
    plan_for(LARGE, 2048)
    calibration.forget()
    assert not calibration.file().exists()
    assert measured(LARGE, 2048, "encode") == {}
    plan_for(LARGE, 2048)
    assert len(timings) == 2


@needs_numba
def test_a_cache_that_cannot_be_written_costs_nothing_but_the_timing(timings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert plan_for(LARGE, 2048) == Plan("cpu", "screen")
    assert len(timings) == 1


@needs_numba
def test_another_number_of_threads_has_timings_of_its_own(monkeypatch):
    before = calibration.file()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert calibration.file() != before


@needs_numba
@pytest.mark.parametrize("purpose", ["train", "encode"])
@pytest.mark.parametrize("reason", [None, "the processor has no VNNI"])
def test_measuring_times_every_candidate(purpose, reason, monkeypatch):
    monkeypatch.setattr(int8, "why_not", lambda: reason)
    seconds = calibration.measure(16, 300, 40, purpose, CPU)
    screens = {"cpu+screen"} if reason else {"cpu+screen", "cpu+int8_screen"}
    assert set(seconds) == {"reference", *screens, *(f"cpu+{library}" for library in multiply.at_hand())}
    assert all(0 < value < 60 for value in seconds.values())
