"""The GPU selection kernels against the reference. Run by ``test_gpu.py``, interpreted or on a GPU; see there."""

import os

import pytest
import torch
from torch import Tensor

from unweave.kernels._triton import DeviceScreen
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Exact, gpu, reference
from unweave.kernels.select.screen import Screen

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SHAPES = [(1, 37), (5, 131), (3, 600)]


def scores_of(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=generator).to(DEVICE), (torch.randn(m, generator=generator) * 0.1).to(DEVICE)


def screened(n: int, m: int, d: int, seed: int = 0, screen: object = None) -> tuple[Tensor, Tensor, Exact]:
    """bfloat16 scores, a shift, and what they come from."""
    generator = torch.Generator().manual_seed(seed)
    X, W = torch.randn(n, d, generator=generator).to(DEVICE), torch.randn(m, d, generator=generator).to(DEVICE)
    W = W / W.norm(dim=1, keepdim=True)
    shift = (torch.randn(m, generator=generator) * 0.1).to(DEVICE)
    low = X.bfloat16() @ W.bfloat16().T
    return low, shift, Exact(X, W, X.norm(dim=1), screen or Screen())  # pyright: ignore[reportArgumentType]


def check(found: tuple[Pattern, Tensor], truth: tuple[Pattern, Tensor], atol: float = 0.0) -> None:
    """Same entries, same values at them; well formed whatever the order."""
    (pattern, values), (wanted, wanted_values) = found, truth
    assert pattern.indices.dtype == torch.int32
    assert pattern.offsets.dtype == torch.int64
    assert pattern.n_features == wanted.n_features
    assert len(values) == len(pattern.indices)
    assert pattern.offsets.tolist() == wanted.offsets.tolist()
    order, wanted_order = pattern.flat.argsort(), wanted.flat.argsort()
    assert torch.equal(pattern.flat[order], wanted.flat[wanted_order])
    torch.testing.assert_close(values[order], wanted_values[wanted_order], rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 7, 10_000])
@pytest.mark.parametrize("signed", [False, True])
def test_topk(shape, k, signed):
    scores, shift = scores_of(*shape)
    check(gpu.topk(scores, shift, k, signed=signed), reference.topk(scores, shift, k, signed=signed))


def test_topk_of_rows_longer_than_the_groups():
    scores, shift = scores_of(2, 2500)
    check(gpu.topk(scores, shift, 20), reference.topk(scores, shift, 20))


def test_topk_above_what_the_kernel_takes(monkeypatch):
    monkeypatch.setattr(gpu, "_MOST_K", 4)
    scores, shift = scores_of(3, 50)
    check(gpu.topk(scores, shift, 5, signed=True), reference.topk(scores, shift, 5, signed=True))
    low, shift, exact = screened(3, 50, 24)
    check(gpu.topk(low, shift, 5, exact=exact), reference.topk(low, shift, 5, exact=exact), atol=1e-5)


def test_topk_of_nothing():
    pattern, values = gpu.topk(torch.zeros(0, 9, device=DEVICE), torch.zeros(9, device=DEVICE), 3)
    assert pattern.n_rows == 0
    assert len(values) == 0


def test_of_equals_the_first_are_kept_in_order_of_their_index():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]], device=DEVICE)
    pattern, values = gpu.topk(scores, torch.zeros(6, device=DEVICE), 4)
    assert pattern.indices.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [3, 2, 3, 2]


def test_rows_of_equals_have_more_candidates_than_room():
    scores, shift = scores_of(3, 700)
    scores[0], scores[2] = 0.5, -1.0
    scores[2, ::3] = 4.0
    pattern, values = gpu.topk(scores, torch.zeros_like(shift), 5)
    assert pattern.indices[:5].tolist() == [0, 1, 2, 3, 4]
    assert pattern.indices[10:].tolist() == [0, 3, 6, 9, 12]
    assert values[:5].tolist() == [0.5] * 5
    assert values[10:].tolist() == [4.0] * 5
    assert set(pattern.indices[5:10].tolist()) == set(scores[1].topk(5).indices.tolist())


def test_fewer_positive_scores_than_k():
    scores = -torch.rand(4, 37, device=DEVICE)
    scores[:, 3] = 1.0
    check(gpu.topk(scores, torch.zeros(37, device=DEVICE), 6), reference.topk(scores, None, 6))


def test_infinities():
    scores, shift = scores_of(3, 60)
    scores[0, 5], scores[1] = float("inf"), float("-inf")
    scores[1, 7] = 0.0
    pattern, values = gpu.topk(scores, shift, 3)
    assert 5 in pattern.indices[:3].tolist()
    assert 7 in pattern.indices[3:6].tolist()
    assert values[3:6].isinf().sum() == 2


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("screen", [False, True])
def test_nan_stays_inside_the_arrays_and_in_its_row(screen, everywhere):
    _, shift, exact = screened(4, 137, 24)
    X = exact.X.clone()
    X[1] = float("nan")
    if everywhere:
        X[:] = float("nan")
    scores = (X.bfloat16() @ exact.W.bfloat16().T) if screen else X @ exact.W.T
    exact = exact._replace(X=X, lengths=X.norm(dim=1))
    pattern, values = gpu.topk(scores, shift, 6, exact=exact if screen else None)
    assert len(values) == 24
    assert int(pattern.indices.min()) >= 0
    assert int(pattern.indices.max()) < 137
    assert values[6:12].isnan().all()
    if not everywhere:
        truth, _ = reference.topk(X @ exact.W.T, shift, 6)
        assert set(pattern.indices[12:18].tolist()) == set(truth.indices[12:18].tolist())
    assert exact.screen.tolerance == exact.screen.tolerance  # not NaN
    for rule in (gpu.above(scores, shift, 1.0), gpu.batch_topk(scores, shift, 12)):
        assert (rule[0].indices >= 0).all()
        assert (rule[0].indices < 137).all()
        assert not rule[1].isnan().any()


@pytest.mark.parametrize("shape", [(1, 37, 24), (2, 131, 33), (2, 200, 24)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tolerance", [1e-9, 2e-3, 10.0])
def test_screened_topk_is_that_of_float32(shape, signed, tolerance):
    """With a margin that lets rows be found wrong, one that fits, and one that leaves no room for the candidates."""
    n, m, d = shape
    screen = DeviceScreen(DEVICE) if signed else Screen()
    low, shift, exact = screened(n, m, d, screen=screen)
    screen.load_state_dict({"tolerance": tolerance, "n_redone": 0, "n_rows": 0})
    truth = reference.topk(low, shift, 4, signed=signed, exact=exact)
    check(gpu.topk(low, shift, 4, signed=signed, exact=exact), truth, atol=1e-5)
    assert screen.n_rows == n
    if tolerance == 10.0:
        assert screen.n_redone == (n if m > 128 else 0)


def test_rows_found_wrong_are_done_again_and_learned_from():
    low, shift, exact = screened(3, 131, 33)
    low = low + 0.05 * torch.randn(3, 131, generator=torch.Generator().manual_seed(1)).to(low)  # as if it were worse
    exact.screen.tolerance = 1e-4
    check(gpu.topk(low, shift, 6, exact=exact), reference.topk(low, shift, 6, exact=exact), atol=1e-5)
    assert exact.screen.n_redone == 3
    assert exact.screen.tolerance > 5e-3


def test_screens_of_both_kinds_learn_the_same():
    states = []
    for screen in (Screen(), DeviceScreen(DEVICE)):
        for seed in range(2):
            low, shift, exact = screened(2, 60, 24, seed, screen)
            gpu.topk(low, shift, 4, exact=exact)
        gpu.above(low, shift, 1.0, exact=exact)
        gpu.batch_topk(low, shift, 8, exact=exact)
        states.append(screen.state_dict())
    assert states[0]["n_rows"] == states[1]["n_rows"]
    assert states[0]["n_redone"] == states[1]["n_redone"]
    assert states[0]["tolerance"] == pytest.approx(states[1]["tolerance"], rel=1e-6)
    loaded = DeviceScreen(DEVICE)
    loaded.load_state_dict(states[1])
    assert loaded.state_dict() == states[1]


@pytest.mark.parametrize("shape", [*SHAPES, (0, 9)])
@pytest.mark.parametrize("threshold", [0.5, 100.0, -100.0, None])
@pytest.mark.parametrize("expected", [1.0, 64.0])
def test_above(shape, threshold, expected):
    scores, shift = scores_of(*shape)
    if threshold is None:
        threshold = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check(gpu.above(scores, shift, threshold, expected=expected), reference.above(scores, shift, threshold))


@pytest.mark.parametrize("tolerance", [1e-9, 2e-3, 1.0])
def test_screened_above_is_that_of_float32(tolerance):
    low, shift, exact = screened(3, 131, 33)
    exact.screen.tolerance = tolerance
    threshold = torch.rand(131, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for wanted in (threshold, 1.5):
        truth = reference.above(low, shift, wanted, exact=exact)
        check(gpu.above(low, shift, wanted, exact=exact, expected=8), truth, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bound", [None, 0.0, 1e9, 1.2, 0.01])
@pytest.mark.parametrize("k", [0, 3, 10_000])
def test_batch_topk(shape, bound, k):
    scores, shift = scores_of(*shape)
    found = gpu.batch_topk(scores, shift, k * shape[0], bound=bound)
    check(found, reference.batch_topk(scores, shift, k * shape[0]))


def test_batch_topk_of_uneven_rows_and_of_none():
    scores, shift = scores_of(6, 200)
    scores[2] += 10  # takes all places
    check(gpu.batch_topk(scores, shift, 90), reference.batch_topk(scores, shift, 90))
    assert len(gpu.batch_topk(-scores.abs(), torch.zeros_like(shift), 30)[1]) == 0
    assert gpu.batch_topk(scores[:0], shift, 30)[0].n_rows == 0


def test_batch_topk_keeps_the_first_of_equals():
    scores = torch.ones(3, 40, device=DEVICE)
    scores[2, 39] = 2.0
    pattern, values = gpu.batch_topk(scores, torch.zeros(40, device=DEVICE), 5)
    assert pattern.flat.tolist() == [0, 1, 2, 3, 119]
    assert values.tolist() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("tolerance", [1e-9, 2e-3, 1.0])
@pytest.mark.parametrize("bound", [None, 1e9])
def test_screened_batch_topk_is_that_of_float32(tolerance, bound):
    low, shift, exact = screened(3, 90, 33)
    exact.screen.tolerance = tolerance
    for n_keep in (20,) if tolerance == 1 else (20, 10_000):
        truth = reference.batch_topk(low, shift, n_keep, exact=exact)
        check(gpu.batch_topk(low, shift, n_keep, bound=bound, exact=exact), truth, atol=1e-5)


def test_the_same_bits_every_time():
    low, shift, _ = screened(5, 131, 33)
    runs = [gpu.topk(low, shift, 9, exact=screened(5, 131, 33)[2]) for _ in range(2)]
    assert torch.equal(runs[0][0].indices, runs[1][0].indices)
    assert torch.equal(runs[0][1], runs[1][1])
