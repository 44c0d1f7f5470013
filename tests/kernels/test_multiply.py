"""The float32 product, by every library at hand."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.kernels import multiply as module
from unweave.kernels.calibration import pin
from unweave.kernels.multiply import LIBRARIES, _openblas, multiply, why_not
from unweave.kernels.workspace import Plan, plan_of

HERE = [library for library in LIBRARIES if why_not(library) is None]
needs_openblas = pytest.mark.skipif("numpy" not in HERE, reason="numpy's matrix library is not OpenBLAS here")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def n_threads() -> list[int]:
    return [library.num_threads for library in _openblas().lib_controllers]


@pytest.mark.parametrize("shape", [(1, 5, 3), (0, 8, 4), (7, 1, 2), (33, 131, 17), (600, 515, 96)])
@pytest.mark.parametrize("library", HERE)
def test_the_product_is_that_of_float64(library, shape):
    n, m, d = shape
    x, W = normal(n, d), normal(m, d, seed=1)
    out = torch.full((n, m), torch.nan)
    found = multiply(x, W, out, library)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ W.double().T, rtol=1e-5, atol=1e-5 * d**0.5)
    assert library == "onednn" or found is out


@pytest.mark.parametrize("library", HERE)
def test_parts_of_larger_matrices_are_multiplied_as_they_lie(library):
    wide, tall = normal(40, 90), normal(300, 64, seed=1)
    x, W = wide[::2, 10:42], tall[100:217, 32:]
    found = multiply(x, W, torch.empty(20, 117), library)
    torch.testing.assert_close(found, x @ W.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("library", HERE)
def test_the_same_product_again_has_the_same_bits(library):
    """On which resuming a run to the bit rests."""
    x, W = normal(700, 64), normal(512, 64, seed=1)
    first = multiply(x, W, torch.empty(700, 512), library).clone()
    for _ in range(3):
        assert torch.equal(multiply(x, W, torch.empty(700, 512), library), first)


@needs_openblas
def test_numpy_is_left_with_the_threads_it_had():
    """Also where two multiply at once, or fail."""
    before = n_threads()
    x, W = normal(900, 64), normal(700, 64, seed=1)

    def work() -> None:
        for _ in range(20):
            multiply(x, W, torch.empty(900, 700), "numpy")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert n_threads() == before
    with pytest.raises(ValueError, match="shape"):
        multiply(x, normal(700, 63), torch.empty(900, 700), "numpy")
    assert n_threads() == before


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_plan_is_named_for_its_library(library):
    plan = Plan("cpu", library=library)
    assert plan_of(f"cpu+{library}") == plan_of(plan.name) == plan
    assert plan.name == ("cpu" if library == "torch" else f"cpu+{library}")
    assert not plan.low


def test_a_pinned_library_that_is_not_here_says_why(monkeypatch):
    monkeypatch.setattr(module, "why_not", lambda library: f"no {library}")
    with pytest.raises(UnweaveError, match="'cpu\\+numpy' cannot be used here: no numpy"):
        pin("cpu+numpy")
