"""The float32 product, by every library at hand."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.kernels import multiply as module
from unweave.kernels.calibration import pin
from unweave.kernels.multiply import LIBRARIES, _alone, _openblas, at_hand, multiply, why_not
from unweave.kernels.workspace import Plan, plan_of

HERE = at_hand()
needs_openblas = pytest.mark.skipif("numpy" not in HERE, reason=str(why_not("numpy")))


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of torch, which ours follow, and of OpenBLAS, whatever the tests as a whole are limited to."""
    before, openblas = torch.get_num_threads(), _openblas()
    n_before = n_threads()
    torch.set_num_threads(request.param)
    if openblas is not None:
        openblas.set(2)
    yield request.param
    torch.set_num_threads(before)
    if openblas is not None:
        openblas.set(n_before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def n_threads() -> int:
    openblas = _openblas()
    return 0 if openblas is None else openblas.get()


@pytest.mark.parametrize("shape", [(1, 5, 3), (0, 8, 4), (7, 1, 2), (33, 131, 17), (600, 515, 96)])
@pytest.mark.parametrize("library", HERE)
def test_the_product_is_that_of_float64(library, shape):
    n, m, d = shape
    x, W = normal(n, d), normal(m, d, seed=1)
    out = torch.full((n, m), torch.nan)
    found = multiply(x, W, lambda: out, library)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ W.double().T, rtol=1e-5, atol=1e-5 * d**0.5)
    assert library == "onednn" or found is out


@pytest.mark.parametrize("library", HERE)
def test_parts_of_larger_matrices_are_multiplied_as_they_lie(library):
    wide, tall = normal(40, 90), normal(300, 64, seed=1)
    x, W = wide[::2, 10:42], tall[100:217, 32:]
    found = multiply(x, W, lambda: torch.empty(20, 117), library)
    torch.testing.assert_close(found, x @ W.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("library", HERE)
def test_the_same_product_again_has_the_same_bits(library):
    """On which resuming a run to the bit rests."""
    x, W = normal(700, 64), normal(512, 64, seed=1)
    first = multiply(x, W, lambda: torch.empty(700, 512), library).clone()
    for _ in range(3):
        assert torch.equal(multiply(x, W, lambda: torch.empty(700, 512), library), first)


@needs_openblas
def test_numpy_is_left_with_the_threads_it_had():
    """Also where some multiply at once, or fail; and has one while they do."""
    before = n_threads()
    assert before == 2
    x, W = normal(900, 64), normal(700, 64, seed=1)
    met: set[int] = set()

    def work() -> None:
        for _ in range(20):
            with _alone:
                multiply(x, W, lambda: torch.empty(900, 700), "numpy")
                met.add(n_threads())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert met == {1}
    assert n_threads() == before
    with pytest.raises(ValueError, match="shape"):
        multiply(x, normal(700, 63), lambda: torch.empty(900, 700), "numpy")
    assert n_threads() == before


@needs_openblas
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_forked_meanwhile_is_free_of_it():
    """As a data loader's workers are: whoever held OpenBLAS to one thread is not there to let it go."""
    with _alone:
        child = os.fork()
        if child == 0:
            with _alone:
                held = n_threads()
            os._exit(0 if (held, n_threads()) == (1, 2) else 1)
        _, status = os.waitpid(child, 0)
        assert n_threads() == 1
    assert status == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_plan_is_named_for_its_library(library):
    plan = Plan("cpu", library=library)
    assert plan_of(f"cpu+{library}") == plan_of(plan.name) == plan
    assert plan.name == f"cpu+{library}"
    assert not plan.low


def test_old_checkpoints_plans_were_by_torch():
    assert plan_of("cpu") == Plan("cpu", library="torch")


def test_a_pinned_library_that_is_not_here_says_why(monkeypatch):
    monkeypatch.setattr(module, "why_not", lambda library: f"no {library}")
    with pytest.raises(UnweaveError, match="'cpu\\+numpy' cannot be used here: no numpy"):
        pin("cpu+numpy")
