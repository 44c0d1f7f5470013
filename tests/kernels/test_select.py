"""Selection on the CPU: the same entries as the reference, from float32 scores and through screens of rougher ones.

Where a result has to be exact, rows and weights are small whole numbers: float32 then adds their products without
rounding, in any order, while 8 bits cannot even hold them. What the screen finds is right to the last bit, or wrong.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.dictionaries import build
from unweave.errors import UnweaveError
from unweave.kernels.backend import why_not
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import AboveRule, BatchTopKRule, Exact, Rule, TopKRule, cpu, reference, select
from unweave.kernels.select.screen import Screen, largest_errors
from unweave.kernels.workspace import Plan, Workspace

pytestmark = pytest.mark.skipif(why_not("cpu") is not None, reason="numba is not installed (pip install numba)")

SHAPES = [(1, 5), (7, 37), (3, 131), (33, 1000), (70, 4099)]
SCREENED = Plan("cpu", "screen")
CERTIFIED = Plan("cpu", "certified")
INT8 = Plan("cpu", "int8_screen")
needs_int8 = pytest.mark.skipif(INT8.why_not() is not None, reason=str(INT8.why_not()))
SCREENS = pytest.mark.parametrize("plan", [SCREENED, CERTIFIED, pytest.param(INT8, marks=needs_int8)], ids=str)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail rather than hang: loops that look again with more room or a lower guess have to end."""

    def out_of_time(*_: object) -> None:
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def ends_in_time(request: pytest.FixtureRequest) -> Iterator[None]:
    with within(900 if request.node.get_closest_marker("slow") else 60):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Whole numbers up to 511: 9 bits, so that 64 products add up exactly in float32's 24, and bfloat16 has 8."""
    return torch.randint(-511, 512, shape, generator=torch.Generator().manual_seed(seed)).float()


def check_pattern(pattern: Pattern, n: int, m: int) -> None:
    assert pattern.n_rows == n
    assert pattern.n_features == m
    assert pattern.offsets[0] == 0
    assert bool((pattern.offsets.diff() >= 0).all())
    assert pattern.offsets[-1] == len(pattern.indices)
    assert bool(((pattern.indices >= 0) & (pattern.indices < m)).all())
    assert len(pattern.flat.unique()) == len(pattern.flat), "an entry was taken twice"


def check_topk(found: tuple[Pattern, Tensor], u: Tensor, k: int, signed: bool = False) -> None:
    """Each row holds the k best of ``u``, at their own values; among equals any."""
    pattern, values = found
    n, m = u.shape
    check_pattern(pattern, n, m)
    assert pattern.offsets.diff().unique().tolist() == ([min(k, m)] if n else [])
    assert torch.equal(values, u.reshape(-1)[pattern.flat])
    rank = u.abs() if signed else u
    kept = rank.reshape(-1)[pattern.flat].view(n, -1).sort(dim=1, descending=True).values
    assert torch.equal(kept, rank.topk(min(k, m), dim=1).values)


def check_batch_topk(found: tuple[Pattern, Tensor], u: Tensor, n_keep: int) -> None:
    """The n_keep best positive ones of all, at their own values; among equals any."""
    pattern, values = found
    check_pattern(pattern, *u.shape)
    assert torch.equal(values, u.reshape(-1)[pattern.flat])
    best = u.reshape(-1).sort(descending=True).values[:n_keep]
    assert torch.equal(values.sort(descending=True).values, best[best > 0])


def check_above(found: tuple[Pattern, Tensor], u: Tensor, threshold: Tensor | float) -> None:
    pattern, values = found
    check_pattern(pattern, *u.shape)
    assert torch.equal(values, u.reshape(-1)[pattern.flat])
    assert set(pattern.flat.tolist()) == set((u > threshold).reshape(-1).nonzero().squeeze(1).tolist())


def check_rule(found: tuple[Pattern, Tensor], u: Tensor, rule: Rule) -> None:
    if isinstance(rule, TopKRule):
        check_topk(found, u, rule.k, rule.signed)
    elif isinstance(rule, BatchTopKRule):
        check_batch_topk(found, u, rule.k * len(u))
    else:
        check_above(found, u, rule.threshold)


# ---- from float32 scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 32, 200])
@pytest.mark.parametrize("signed", [False, True])
def test_topk_takes_the_best_of_each_row_also_where_k_exceeds_the_width(shape, k, signed):
    scores, shift = normal(*shape), normal(shape[1], seed=1)
    check_topk(cpu.topk(scores, shift, k, signed=signed), scores + shift, k, signed)
    check_topk(reference.topk(scores, shift, k, signed=signed), scores + shift, k, signed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 32])
@pytest.mark.parametrize("bound", [None, 1e-9, 1.0, 1e9])
def test_batch_topk_takes_the_best_of_the_batch_whatever_the_guess(shape, k, bound):
    scores, shift = normal(*shape), normal(shape[1], seed=1)
    n_keep = k * len(scores)
    check_batch_topk(cpu.batch_topk(scores, shift, n_keep, bound=bound), scores + shift, n_keep)
    check_batch_topk(reference.batch_topk(scores, shift, n_keep, bound=bound), scores + shift, n_keep)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.0, 2.5, 100.0, "each"])
@pytest.mark.parametrize("expected", [0.0, 64.0])
def test_above_takes_everything_above_a_threshold_whatever_room_was_made(shape, threshold, expected):
    scores, shift = normal(*shape), normal(shape[1], seed=1)
    at = normal(shape[1], seed=2) + 1 if threshold == "each" else threshold
    check_above(cpu.above(scores, shift, at, expected=expected), scores + shift, at)
    check_above(reference.above(scores, shift, at, expected=expected), scores + shift, at)


@pytest.mark.parametrize("m", [5, 37, 131, 1000])
@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_equal_scores_still_give_the_number_asked_for(m, k, value):
    scores, shift = torch.full((4, m), value), torch.zeros(m)
    check_topk(cpu.topk(scores, shift, k), scores, k)
    check_topk(cpu.topk(scores, shift, k, signed=True), scores, k, signed=True)
    if 4 * k < 4 * m:
        check_batch_topk(cpu.batch_topk(scores, shift, 4 * k), scores, 4 * k)
    check_above(cpu.above(scores, shift, value), scores, value)  # above is above, not at
    assert len(cpu.above(scores, shift, value)[1]) == 0


@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_duplicated_features_are_ties(copies, k):
    scores = normal(9, 61).repeat(1, copies)
    shift = normal(61, seed=1).repeat(copies)
    check_topk(cpu.topk(scores, shift, k), scores + shift, k)
    check_topk(cpu.topk(scores, shift, k, signed=True), scores + shift, k, signed=True)
    check_batch_topk(cpu.batch_topk(scores, shift, 9 * k), scores + shift, 9 * k)


@pytest.mark.parametrize("levels", [2, 3, 10])
def test_scores_of_a_few_levels(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(-1, levels - 1, (50, 300), generator=generator).float()
    shift = torch.zeros(300)
    for k in (1, 20, 150):
        check_topk(cpu.topk(scores, shift, k), scores, k)
        check_batch_topk(cpu.batch_topk(scores, shift, 50 * k), scores, 50 * k)
    for threshold in (-1.0, 0.0, 1.0):
        check_above(cpu.above(scores, shift, threshold), scores, threshold)


@pytest.mark.parametrize("m", [5, 131, 1000])
def test_rows_without_a_positive_score(m):
    scores, shift = -normal(6, m).abs() - 0.1, torch.zeros(m)
    check_topk(cpu.topk(scores, shift, 3), scores, 3)
    check_batch_topk(cpu.batch_topk(scores, shift, 18), scores, 18)
    assert len(cpu.batch_topk(scores, shift, 18, bound=0.5)[1]) == 0
    check_above(cpu.above(scores, shift, 0.0), scores, 0.0)
    scores[2] *= -1  # one row does all the work
    check_batch_topk(cpu.batch_topk(scores, shift, 18), scores, 18)


def test_no_rows():
    scores, shift = torch.zeros(0, 131), torch.zeros(131)
    for rule in (TopKRule(3), BatchTopKRule(3), AboveRule(0.0)):
        pattern, values = select(cpu, rule, scores, shift)
        assert pattern.n_rows == 0
        assert len(values) == 0


@pytest.mark.parametrize("shape", [(1, 5), (3, 37), (40, 131), (2, 1000)])
def test_rows_in_which_every_entry_is_taken(shape):
    scores, shift = normal(*shape).abs() + 0.1, torch.zeros(shape[1])
    with within(20):
        check_above(cpu.above(scores, shift, 0.0), scores, 0.0)
        check_batch_topk(cpu.batch_topk(scores, shift, scores.numel()), scores, scores.numel())


@pytest.mark.parametrize("huge", [1e6, 1e12, 1e20, 1e38])
def test_one_enormous_score_does_not_blur_the_others(huge):
    scores, shift = normal(5, 300), torch.zeros(300)
    scores[:, 7] = huge
    check_topk(cpu.topk(scores, shift, 10), scores, 10)
    check_topk(cpu.topk(scores[:, :40].contiguous(), shift[:40], 10), scores[:, :40], 10)
    check_batch_topk(cpu.batch_topk(scores, shift, 50), scores, 50)
    check_above(cpu.above(scores, shift, 1.0), scores, 1.0)


def test_scores_that_are_columns_of_a_larger_matrix():
    whole_matrix, shift = normal(20, 700), normal(150, seed=1)
    for start in (0, 1, 333, 550):
        scores = whole_matrix[:, start : start + 150]
        check_topk(cpu.topk(scores, shift, 9), scores + shift, 9)
        check_batch_topk(cpu.batch_topk(scores, shift, 100), scores + shift, 100)
        check_above(cpu.above(scores, shift, 0.7), scores + shift, 0.7)
    transposed = normal(150, 20).T
    check_topk(cpu.topk(transposed, shift, 9), transposed + shift, 9)
    one = whole_matrix[3:4, 100:250]
    check_topk(cpu.topk(one, shift, 9), one + shift, 9)


def test_features_switched_off_by_an_infinite_bias_are_never_taken():
    scores, shift = normal(6, 200), torch.zeros(200)
    shift[::3] = -torch.inf
    check_topk(cpu.topk(scores, shift, 20), scores + shift, 20)
    check_batch_topk(cpu.batch_topk(scores, shift, 120), scores + shift, 120)
    check_above(cpu.above(scores, shift, 0.5), scores + shift, 0.5)


# ---- through a screen ------------------------------------------------------------------------------------------------

RULES: list[Rule] = [
    TopKRule(1),
    TopKRule(13),
    TopKRule(13, signed=True),
    BatchTopKRule(13),
    BatchTopKRule(13, bound=1e6),
    AboveRule(2e6),
    AboveRule(0.0),
]


def data(seed: int, n: int = 60, m: int = 700, d: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    return whole(n, d, seed=seed), whole(m, d, seed=seed + 100), 1000 * whole(m, seed=seed + 200)


def screened(work: Workspace, rule: Rule, X: Tensor, W: Tensor, b: Tensor) -> tuple[Pattern, Tensor]:
    """Select, and look: rough scores are never right to the last bit here, so the right answer was worked out."""
    u = X @ W.T + b
    assert torch.equal(u.double(), X.double() @ W.double().T + b.double()), "this test's numbers are not exact"
    work.forget()
    return work.select(rule, X, W, b)


@SCREENS
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", RULES)
def test_screened_selection_is_that_of_float32(plan, rule, seed):
    X, W, b = data(seed)
    work = Workspace(plan)
    for _ in range(3):  # with the tolerance it starts with, and those it learns
        check_rule(screened(work, rule, X, W, b), X @ W.T + b, rule)
    assert work.screen.n_rows >= 180
    assert plan is not CERTIFIED or work.screen.n_redone == 0


@pytest.mark.parametrize(
    ("plan", "trust"), [(SCREENED, 0.0), pytest.param(INT8, 0.3, marks=needs_int8)], ids=["bfloat16", "int8"]
)
@pytest.mark.parametrize("rule", RULES)
def test_a_screen_that_trusts_rough_scores_too_much_notices_and_does_the_rows_again(plan, trust, rule):
    noticed = 0  # a rule that takes a handful of entries may meet no error worth noticing in one batch
    for seed in range(6):
        X, W, b = data(seed)
        work = Workspace(plan)
        work.screen.tolerance = trust
        check_rule(screened(work, rule, X, W, b), X @ W.T + b, rule)
        redone = work.screen.n_redone
        if redone:
            noticed += 1
            assert work.screen.tolerance > max(1e-4, 1.5 * trust)  # it has learned
        check_rule(screened(work, rule, X, W, b), X @ W.T + b, rule)
        assert work.screen.n_redone <= redone + 2 * (plan is INT8)  # of 60, where few entries were looked at
    assert noticed


@SCREENS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_screen_with_rows_of_enormous_norm_and_zero_rows(plan, rule, seed):
    X, W, b = data(seed)
    X[5] *= 1024
    X[[11, 40]] = 0
    X[::7] /= 1024
    b = (b / 1024**2).round() * 1024 if not isinstance(rule, AboveRule) else torch.zeros(len(b))
    work = Workspace(plan)
    for _ in range(2):
        check_rule(screened(work, rule, X, W, b), X @ W.T + b, rule)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_screen_with_near_ties_and_ties(rule, seed):
    """Groups of encoder rows that differ by one unit in one place: bfloat16 sees them in any order."""
    X, W, b = data(seed)
    W = W[:70].repeat(10, 1)
    W[torch.arange(700), torch.arange(700) % 40] += torch.arange(700) // 140
    b = b[:70].repeat(10)
    for plan, tolerance in ((SCREENED, 2e-3), (SCREENED, 0.0), (CERTIFIED, 1.0), (INT8, 6.0)):
        if plan.why_not():
            continue
        work = Workspace(plan)
        work.screen.tolerance = tolerance
        check_rule(screened(work, rule, X, W, b), X @ W.T + b, rule)


@SCREENS
@pytest.mark.parametrize("rule", RULES)
def test_screen_where_the_bias_takes_back_what_the_product_gives(plan, rule):
    """Rows with a large common part, which the bias removes: bfloat16 rounds the product before the sum is small."""
    X, W, b = data(0, d=32)
    X[:, 0], W[:, 0] = 511 * 8, 511 * 4
    b = b / 1000 - 511 * 8 * 511 * 4
    work = Workspace(plan)
    for _ in range(6):
        check_rule(screened(work, rule, X, W, b), X @ W.T + b, rule)


@SCREENS
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [8, 64])
def test_screen_with_one_encoder_row_much_longer_than_the_others(plan, rule, scale):
    """A long row's scores are wrong by more than the others', and it is rarely the one that was looked at."""
    for seed in range(6):
        X, W, b = data(seed, n=200)
        X, W = (X / 4).round(), (W / 4).round()
        W[3] = scale * W[3] - (scale * W[3]).mean().round()
        b = torch.zeros(len(b))
        work = Workspace(plan)
        for _ in range(3):
            check_rule(screened(work, rule, X, W, b), X @ W.T + b, rule)


@SCREENS
def test_screened_values_are_float32_accurate_on_ordinary_numbers(
    plan,
):
    X, W, b = normal(100, 64), normal(900, 64, seed=1) / 8, normal(900, seed=2) / 4
    truth = X.double() @ W.double().T + b.double()
    for rule in (TopKRule(20), BatchTopKRule(20), AboveRule(1.5)):
        pattern, values = Workspace(plan).select(rule, X, W, b)
        check_pattern(pattern, 100, 900)
        at = truth.reshape(-1)[pattern.flat]
        torch.testing.assert_close(values.double(), at, rtol=1e-5, atol=1e-5)
        plain, _ = Workspace(Plan("cpu")).select(rule, X, W, b)
        assert set(pattern.flat.tolist()) == set(plain.flat.tolist())


def test_screen_follows_a_rising_error_at_once_and_a_falling_one_slowly():
    screen = Screen()
    screen.update(0.1, 2, 10)
    assert screen.tolerance == pytest.approx(0.15)
    screen.update(0.0, 0, 10)
    assert screen.tolerance == pytest.approx(0.135)
    assert (screen.n_redone, screen.n_rows) == (2, 20)
    for broken in (float("nan"), float("inf")):
        screen.update(broken, 1, 10)
    assert screen.tolerance == pytest.approx(0.135)
    other = Screen()
    other.load_state_dict(screen.state_dict())
    assert other.state_dict() == screen.state_dict()


# ---- margins that are proven ---------------------------------------------------------------------------------------


def worst_errors(X: Tensor, W: Tensor, ops: Any) -> Tensor:
    """The largest error of each row's bfloat16 scores beyond their own rounding, as a share of its bound."""
    low, shadow = X.bfloat16(), W.bfloat16()
    scores = (low @ shadow.T).double()
    off = (X.double() @ W.double().T - scores).abs() - scores.abs() / 256
    return off.amax(1) / largest_errors(ops, X, low, W, shadow).clamp_min(1e-30)


@pytest.mark.parametrize("ops", [reference, cpu])
@pytest.mark.parametrize("d", [1, 7, 64, 1000])
def test_no_bfloat16_score_is_further_off_than_its_bound(d, ops):
    largest = []
    for seed in range(4):
        X, W = normal(40, d, seed=seed), normal(300, d, seed=seed + 50)
        wild = torch.exp(3 * normal(40, d, seed=seed + 90))  # a few numbers rule the row
        for rows in (X, wild, wild * X, torch.zeros(3, d)):
            assert float(worst_errors(rows, W, ops).max()) <= 1
        largest.append(float(worst_errors(X, W, ops).max()))
    assert d > 64 or max(largest) > 0.01  # the bound is no wish for safety at any price


@pytest.mark.parametrize("ops", [reference, cpu])
def test_the_bound_is_nearly_met_where_all_roundings_go_one_way(ops):
    """1 + 0.9 / 256 becomes 1 in bfloat16, in rows and in weights; the products of these cancel but for that."""
    row, other = torch.full((1, 256), 1 + 0.9 / 256), torch.full((1, 256), 1.0)
    W = torch.cat([row[:, :128], -other[:, :128]], 1)
    share = float(worst_errors(row, W, ops).max())
    assert 0.2 < share <= 1


def test_only_a_proven_margin_finds_what_bfloat16_hides():
    """Rows that bfloat16 holds exactly teach a screen to trust it.

    Then comes one where the best feature's score is made of what rounding takes away: it is never looked at again.
    """
    d, m = 256, 300
    W = torch.zeros(m, d)
    W[:, 0] = torch.linspace(0.05, 0.2, m).bfloat16().float()
    W[7] = torch.cat([torch.full((d // 2,), 1 + 0.9 / 256), torch.full((d // 2,), -1.0)])
    exactly = torch.zeros(1, d)
    exactly[0, 0] = 1
    hidden = torch.full((1, d), 1 + 0.9 / 256)
    assert float((hidden @ W.T).argmax()) == 7
    found = {}
    for plan in (SCREENED, CERTIFIED):
        work = Workspace(plan)
        for _ in range(60):
            work.select(TopKRule(1), exactly, W, torch.zeros(m))
        pattern, _ = work.select(TopKRule(1), hidden, W, torch.zeros(m))
        found[plan] = pattern.indices.tolist()
        assert work.screen.n_redone == 0
    assert found[CERTIFIED] == [7]
    assert found[SCREENED] != [7]


def test_a_proven_margin_holds_for_scores_below_zero_too():
    """The screened score lies further from zero than the true one, so it is rounded more coarsely.

    The two best differ by 1e-5; found by drawing at random.
    """
    X = torch.tensor([[1.0663291215896606, -1.6289660930633545, -1.73823881149292, 1.1836016178131104]])
    W = torch.tensor(
        [[0.1669921875, 0.212890625, -0.11669921875, -0.0595703125], [1.7265625, 1.734375, -1.7421875, -1.7578125]]
    )
    assert int((X.double() @ W.double().T).argmax()) == 1
    pattern, _ = Workspace(CERTIFIED).select(TopKRule(1), X, W, torch.zeros(2))
    assert pattern.indices.tolist() == [1]


@SCREENS
@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-23, 1e-40])
def test_rows_that_vanish_beside_their_bias_are_screened_and_done(plan, scale):
    X, W = (
        torch.nn.functional.normalize(normal(64, 32), dim=1),
        torch.nn.functional.normalize(normal(256, 32, seed=1), dim=1),
    )
    b = torch.zeros(256)
    b[:6] = 1.3
    X[9] *= scale
    for rule in RULES:
        work = Workspace(plan)
        before = work.screen.tolerance
        with within(10):
            pattern, _ = work.select(rule, X, W, b)
            everywhere, _ = work.select(rule, X * scale, W, b * 0)
        plain, _ = Workspace(Plan("cpu")).select(rule, X, W, b)
        assert set(pattern.flat.tolist()) == set(plain.flat.tolist())
        assert everywhere.n_rows == 64
        assert work.screen.tolerance <= max(1, before) or scale < 1e-20  # the squares of such a row are 0


def test_what_another_screen_learned_does_not_narrow_a_proven_margin():
    work = Workspace(CERTIFIED)
    work.load_state_dict({"tolerance": 2e-3, "n_redone": 1, "n_rows": 5})
    assert work.state_dict() == {"tolerance": 1.0, "n_redone": 1, "n_rows": 5}


# ---- bfloat16 as it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_scores_are_taken_as_they_are(rule, seed):
    X, W, b = normal(60, 40, seed=seed), normal(700, 40, seed=seed + 9), normal(700, seed=seed + 20)
    scores = (X.bfloat16() @ W.bfloat16().T).float()
    check_rule(Workspace(Plan("cpu", "bfloat16")).select(rule, X, W, b), scores + b, rule)
    check_rule(select(reference, rule, scores.bfloat16(), b), scores + b, rule)


@pytest.mark.parametrize("seed", range(3))
def test_a_fine_rule_gets_float32_scores_from_bfloat16_too(seed):
    X, W, b = whole(60, 40, seed=seed), whole(700, 40, seed=seed + 9), whole(700, seed=seed + 20)
    threshold = 4e5 + 1e3 * whole(700, seed=seed + 40).abs()
    for backend in ("reference", "cpu"):
        for rule in (AboveRule(threshold, fine=True), AboveRule(5e5, fine=True)):
            found = Workspace(Plan(backend, "bfloat16")).select(rule, X, W, b)
            assert len(found[1]) > 1000
            check_rule(found, X @ W.T + b, rule)


# ---- numbers that are none -----------------------------------------------------------------------------------------

BROKEN = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize(
    "scores", ["float32", "screen", "certified", "bfloat16", pytest.param("int8_screen", marks=needs_int8)]
)
@pytest.mark.parametrize("where", ["one", "row", "feature", "all"])
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("rule", [TopKRule(5), TopKRule(5, signed=True), BatchTopKRule(5), AboveRule(0.5)])
def test_broken_scores_neither_hang_nor_leave_the_matrix(rule, value, where, scores):
    X, W, b = normal(8, 16), normal(200, 16, seed=1), torch.zeros(200)
    if where == "one":
        b[17] = value
    elif where == "row":
        X[3] = value
    elif where == "feature":
        W[17] = value
    else:
        X[:], b[:] = value, value
    work = Workspace(Plan("cpu", scores))
    with within(10):
        pattern, values = work.select(rule, X, W, b)
    assert pattern.n_rows == 8
    assert len(values) == len(pattern.indices) == int(pattern.offsets[-1])
    assert bool(((pattern.indices >= 0) & (pattern.indices < 200)).all())
    assert 0 < work.screen.tolerance < float("inf")


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "jumprelu", "relu"])
@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("training", [False, True])
def test_encode_refuses_what_is_not_a_number(arch, value, training):
    dictionary = build(arch, 12, 40, **({"k": 3} if "topk" in arch else {})).train(training)
    x = normal(9, 12)
    x[4, 2] = value
    with torch.no_grad(), pytest.raises(UnweaveError, match=r"1 of 9 rows hold NaN or infinity \(first: row 4\)"):
        dictionary.encode(x)


@pytest.mark.slow
def test_kernels_stay_inside_their_arrays(tmp_path):
    """The tests of this file once more with numba checking every index: it raises where a kernel would read outside."""
    if os.environ.get("NUMBA_BOUNDSCHECK"):
        pytest.skip("this is the second run")
    checked = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    files = [str(Path(__file__).with_name(name)) for name in ("test_select.py", "test_cpu_ops.py", "test_int8.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env={**os.environ, **checked}, capture_output=True, text=True)
    assert "out of bounds" not in done.stdout, done.stdout[-6000:]
    assert done.returncode == 0, done.stdout[-6000:]


def test_exact_screen_takes_norms_as_given():
    """``select`` itself, without a workspace: bfloat16 scores need what they were made from."""
    X, W, b = data(7)
    scores = X.bfloat16() @ W.bfloat16().T
    exact = Exact(X, W, X.norm(dim=1), Screen())
    for rule in RULES:
        check_rule(select(cpu, rule, scores, b, exact), X @ W.T + b, rule)
        check_rule(select(reference, rule, scores, b, exact), X @ W.T + b, rule)
