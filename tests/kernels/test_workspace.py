"""What is kept between batches changes no result: chunks, buffers, shadows, and products shared by several encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unweave.kernels import backend, workspace
from unweave.kernels.backend import why_not
from unweave.kernels.joint import JointProduct, JointWorkspace
from unweave.kernels.multiply import at_hand
from unweave.kernels.pattern import Pattern, concatenate
from unweave.kernels.select import AboveRule, BatchTopKRule, Rule, TopKRule
from unweave.kernels.threads import serial
from unweave.kernels.workspace import Plan, Workspace

NUMBA = pytest.mark.skipif(why_not("cpu") is not None, reason="numba is not installed (pip install numba)")
INT8 = Plan("cpu", "int8_screen")
PLANS = [
    Plan("reference"),
    Plan("reference", "screen"),
    Plan("reference", "certified"),
    *(pytest.param(Plan("cpu", library=library), marks=NUMBA) for library in at_hand()),
    pytest.param(Plan("cpu", "screen"), marks=NUMBA),
    pytest.param(Plan("cpu", "certified"), marks=NUMBA),
    Plan("reference", "int8_screen"),
    pytest.param(INT8, marks=pytest.mark.skipif(INT8.why_not() is not None, reason=str(INT8.why_not()))),
]
RULES: list[Rule] = [TopKRule(5), TopKRule(5, signed=True), BatchTopKRule(5), AboveRule(1.5)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(m: int, d: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    return normal(m, d, seed=seed) / d**0.5, normal(m, seed=seed + 100) / 10


def entries(found: tuple[Pattern, Tensor]) -> dict[int, float]:
    pattern, values = found
    return dict(zip(pattern.flat.tolist(), values.tolist(), strict=True))


def same(ours: tuple[Pattern, Tensor], theirs: tuple[Pattern, Tensor]) -> None:
    """The same entries in any order, with the same values up to the last digits."""
    assert ours[0].n_rows == theirs[0].n_rows
    assert torch.equal(ours[0].offsets, theirs[0].offsets)
    a, b = entries(ours), entries(theirs)
    assert a.keys() == b.keys()
    assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 47])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("plan", PLANS)
def test_rows_in_chunks_give_the_code_of_the_whole(plan, rule, n, monkeypatch):
    X, (W, b) = normal(n, 16), encoder(150)
    whole = Workspace(plan).select(rule, X, W, b)
    monkeypatch.setattr(workspace, "_CHUNK", 10)
    same(Workspace(plan).select(rule, X, W, b), whole)
    same(Workspace(plan).select(rule, X, W, b, norms=X.norm(dim=1)), whole)


def test_patterns_below_each_other():
    one = Pattern(torch.tensor([0, 2, 2]), torch.tensor([3, 1], dtype=torch.int32), 5)
    two = Pattern(torch.tensor([0, 1]), torch.tensor([4], dtype=torch.int32), 5)
    both = concatenate([one, two, one])
    assert both.offsets.tolist() == [0, 2, 2, 3, 5, 5]
    assert both.indices.tolist() == [3, 1, 4, 3, 1]
    assert both.rows.tolist() == [0, 0, 2, 3, 3]


@pytest.mark.parametrize("plan", PLANS)
def test_a_workspace_used_again_forgets_the_last_batch(plan):
    """Batches of other sizes, wider encoders, and a result that is held while the next one is made."""
    work, (W, b), (wide, wide_b) = Workspace(plan), encoder(150), encoder(333, seed=7)
    first = work.select(TopKRule(5), normal(30, 16), W, b)
    kept = entries(first)
    for n in (30, 4, 61):
        same(
            work.select(TopKRule(5), normal(n, 16, seed=n), W, b),
            Workspace(plan).select(TopKRule(5), normal(n, 16, seed=n), W, b),
        )
    work.forget()
    same(
        work.select(TopKRule(5), normal(8, 16), wide, wide_b),
        Workspace(plan).select(TopKRule(5), normal(8, 16), wide, wide_b),
    )
    assert entries(first) == kept


@pytest.mark.parametrize("plan", PLANS)
def test_the_shadow_is_copied_anew_after_forgetting(plan):
    work, X, (W, b) = Workspace(plan), normal(40, 16), encoder(150)
    work.select(TopKRule(5), X, W, b)
    W.mul_(-1)
    if plan.low:
        assert work.encoder.copy is not None
        assert torch.equal(work.encoder.copy, -W.bfloat16())
    work.forget()
    assert work.encoder.copy is None
    same(work.select(TopKRule(5), X, W, b), Workspace(Plan()).select(TopKRule(5), X, W, b))
    assert (work.encoder.copy is None) == (not plan.low)


def test_products_that_only_nudge_are_in_bfloat16_where_the_plan_screens(monkeypatch):
    a, b = normal(20, 16), normal(16, 30, seed=1)
    assert torch.equal(Workspace(Plan()).product(a, b), a @ b)
    low = Workspace(Plan(scores="screen")).product(a, b)
    assert low.dtype == torch.float32
    assert 0 < float((low - a @ b).norm() / (a @ b).norm()) < 1e-2
    for fast in (False, True):  # an int8 screen serves processors that are slow at bfloat16 too
        monkeypatch.setattr(backend, "has_fast_bfloat16", lambda fast=fast: fast)
        assert torch.equal(Workspace(Plan(scores="int8_screen")).product(a, b), low if fast else a @ b)


def test_what_a_screen_has_learned_is_saved():
    work = Workspace(Plan(scores="screen"))
    work.screen.update(0.5, 3, 100)
    other = Workspace(Plan(scores="screen"))
    other.encoder.copy = normal(3, 3).bfloat16()
    other.load_state_dict(work.state_dict())
    assert other.state_dict() == work.state_dict() == {"tolerance": 0.75, "n_redone": 3, "n_rows": 100}
    assert other.encoder.copy is None


# ---- several encoders in one product ---------------------------------------------------------------------------------

SIZES = (150, 33, 400)


def joint(plan: Plan) -> tuple[JointProduct, list[JointWorkspace], list[nn.Parameter], list[Tensor]]:
    made = [encoder(m, seed=m) for m in SIZES]
    weights = [nn.Parameter(W) for W, _ in made]
    product = JointProduct(weights, plan)
    return product, [JointWorkspace(product, i) for i in range(len(SIZES))], weights, [b for _, b in made]


def select_as(work: Workspace, rule: Rule, X: Tensor, W: Tensor, b: Tensor, centre: Tensor | None) -> Any:
    return work.select(rule, X if centre is None else X - centre, W, b, raw=(X, centre))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_joint_product_gives_each_encoder_its_own_code(plan, rule):
    _, works, weights, biases = joint(plan)
    for seed in range(3):
        X = normal(40, 16, seed=seed) + 1
        centres = [X.mean(0), None, normal(16, seed=50)]  # each dictionary subtracts its own, or none
        for work, W, b, centre in zip(works, weights, biases, centres):
            same(select_as(work, rule, X, W, b, centre), select_as(Workspace(Plan()), rule, X, W, b, centre))


@pytest.mark.parametrize("plan", PLANS)
def test_members_that_step_one_after_the_other_see_their_present_weights(plan):
    """The product is made once a batch; a member's step moves only its own rows, which it has used by then."""
    product, works, weights, biases = joint(plan)
    for seed in range(3):
        X = normal(40, 16, seed=seed)
        for number, (work, W, b) in enumerate(zip(works, weights, biases)):
            same(select_as(work, TopKRule(5), X, W, b, None), select_as(Workspace(Plan()), TopKRule(5), X, W, b, None))
            with torch.no_grad():
                W.add_(normal(*W.shape, seed=10 * seed + number))  # as the update kernel does, the shadow too
                if work.encoder.copy is not None:
                    work.encoder.copy.copy_(W)
        assert product.scores(X)[0] is product.scores(X)[0]


@pytest.mark.parametrize("plan", PLANS)
def test_a_member_moved_by_others_hands_tells_the_joint_product(plan):
    _, works, weights, biases = joint(plan)
    X = normal(40, 16)
    for work, W, b in zip(works, weights, biases):
        select_as(work, TopKRule(5), X, W, b, None)
        with torch.no_grad():
            W.neg_()
        work.forget()
    for work, W, b in zip(works, weights, biases):
        same(select_as(work, TopKRule(5), X, W, b, None), select_as(Workspace(Plan()), TopKRule(5), X, W, b, None))


def test_encoders_are_views_of_one_matrix_until_they_part():
    product, _, weights, _ = joint(Plan())
    before = [W.detach().clone() for W in weights]
    assert product.W.shape == (sum(SIZES), 16)
    assert len({W.untyped_storage().data_ptr() for W in weights}) == 1
    with torch.no_grad():
        weights[1].zero_()
    assert bool((product.W[150:183] == 0).all())
    product.part()
    assert len({W.untyped_storage().data_ptr() for W in weights}) == 3
    for number in (0, 2):
        assert torch.equal(weights[number], before[number])
        assert weights[number].untyped_storage().nbytes() == before[number].nbytes


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_small_tensors_are_worked_on_by_one_thread_and_large_ones_are_not():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with serial(torch.zeros(100)):
            assert torch.get_num_threads() == 1
            with serial(torch.zeros(100)):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        with serial(torch.zeros(1).expand(2**18 + 1)):
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), serial(torch.zeros(100)):
            _ = 1 // 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
