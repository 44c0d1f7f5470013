"""Sparse products, Adam and the fused update: the reference against autograd and torch.optim in float64, then the
compiled CPU kernels against the reference in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from unweave.kernels.adam import reference as adam_reference
from unweave.kernels.adam.reference import AdamStep, Rows
from unweave.kernels.backend import Backend, backend, why_not
from unweave.kernels.gradients.reference import Extra
from unweave.kernels.pattern import Pattern

needs_numba = pytest.mark.skipif(why_not("cpu") is not None, reason="numba is not installed (pip install numba)")
REFERENCE = backend("reference")

# (rows, d, features, entries a row): primes, one row, more entries than features, rows that stay empty, no rows at all
SHAPES = [(1, 1, 1, 1), (1, 7, 5, 9), (33, 17, 131, 4), (70, 24, 257, 0.5), (20, 5, 7, 100), (0, 6, 11, 3)]
SHAPES += [(300, 13, 90, 8), (6, 40, 1000, 32)]


class Problem(NamedTuple):
    pattern: Pattern
    values: Tensor
    W: Tensor  # (m, d)
    bias: Tensor
    A: Tensor  # (n, d)
    target: Tensor
    extra: Extra


def problem(n: int, d: int, m: int, k: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """Rows with about ``k`` entries each; a third of the features never fires, and every fifth value is 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    chosen = torch.rand(n, m, generator=g) < min(1.0, k / m)
    chosen[:, ::3] &= m < 3
    counts = chosen.sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    pattern = Pattern(offsets, chosen.nonzero()[:, 1].int(), m)
    values = normal(len(pattern.indices))
    values[::5] = 0
    at = torch.full((m,), -1)
    at[1::4] = torch.arange(len(at[1::4])).flip(0)
    extra = Extra(at, normal(int((at >= 0).sum()), d), normal(m))
    return Problem(pattern, values, normal(m, d), normal(d), normal(n, d), normal(n, d), extra)


EXTRAS: dict[str, tuple[int, ...]] = {"nothing extra": (), "rows": (0, 1), "pull": (2,), "rows and pull": (0, 1, 2)}


def extra_of(made: Problem, which: str) -> Extra:
    return Extra(*(part if i in EXTRAS[which] else None for i, part in enumerate(made.extra)))


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(ours: Tensor, truth: Tensor) -> None:
    """Within 1e-5 of the largest number: sums of float32 are reordered, and some of them cancel."""
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5 * max(scale, 1e-6))


def rows_of(made: Problem, *, shadow: bool = False, unit_norm: bool = False, seed: int = 5) -> Rows:
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(made.W, dim=1) if unit_norm else made.W.clone()
    first, second = (torch.randn(W.shape, generator=g, dtype=torch.float64).to(W) for _ in range(2))
    return Rows(W, 0.1 * first, 0.01 * second.square(), W.bfloat16() if shadow else None, unit_norm)


# ---- the reference against autograd and torch.optim, in float64 ------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_residual_is_the_gradient_of_the_squared_error(shape):
    p = problem(*shape, dtype=torch.float64)
    values, bias = p.values.clone().requires_grad_(), p.bias.clone().requires_grad_()
    dense = torch.zeros(p.pattern.n_rows * shape[2], dtype=torch.float64).index_put((p.pattern.flat,), values)
    difference = dense.view(-1, shape[2]) @ p.W + bias - p.target
    grads = torch.autograd.grad(0.35 * difference.square().sum(), (values, bias))
    error, at_values, squares = REFERENCE.decode.decode_residual(p.pattern, p.values, p.W, p.bias, p.target, 0.7)
    torch.testing.assert_close(squares, difference.detach().square().sum(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(at_values, grads[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(error.sum(0), grads[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_outer_is_the_gradient_of_a_decode(shape):
    p = problem(*shape, dtype=torch.float64)
    W = p.W.clone().requires_grad_()
    (truth,) = torch.autograd.grad(((p.pattern.densify(p.values) @ W) * p.A).sum(), W)
    columns = REFERENCE.csc.csc(p.pattern)
    torch.testing.assert_close(REFERENCE.gradients.sum_outer(columns, p.values, p.A), truth, rtol=1e-10, atol=1e-10)
    at, more, pull = p.extra
    assert at is not None
    assert more is not None
    assert pull is not None
    truth[at >= 0] += more[at[at >= 0]]
    truth += pull[:, None] * p.W
    ours = REFERENCE.gradients.sum_outer(columns, p.values, p.A, p.W, p.extra)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
def test_adam_rows_take_the_steps_of_torch_adam(betas):
    g = torch.Generator().manual_seed(0)
    W = torch.nn.Parameter(torch.randn(9, 5, generator=g, dtype=torch.float64))
    ours = Rows(W.detach().clone(), torch.zeros_like(W), torch.zeros_like(W))
    optimizer = torch.optim.Adam([W], lr=0.03, betas=betas, eps=1e-8)
    for number in range(1, 21):
        W.grad = torch.randn(9, 5, generator=g, dtype=torch.float64)
        adam_reference.adam_rows(ours, 2 * W.grad, AdamStep(0.03, betas, 1e-8, number), clip=0.5)
        optimizer.step()
    state = optimizer.state[W]
    for mine, theirs in zip(ours[:3], (W.detach(), state["exp_avg"], state["exp_avg_sq"])):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_projected_gradients_are_orthogonal_to_their_rows():
    p = problem(0, 13, 40, 1, dtype=torch.float64)
    rows = rows_of(p, unit_norm=True)
    left = adam_reference.project(rows, p.W.clone())
    assert float((left * rows.W).sum(1).abs().max()) < 1e-12
    plain = rows._replace(unit_norm=False)
    assert torch.equal(adam_reference.project(plain, p.W.clone()), p.W)


# ---- the compiled kernels against the reference, in float32 ---------------------------------------------------------


@pytest.fixture(scope="module")
def cpu() -> Backend:
    return backend("cpu")


@needs_numba
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_compiled_decode_and_products_equal_the_reference(shape, seed, cpu):
    p = problem(*shape, seed=seed)
    same(cpu.decode.decode(p.pattern, p.values, p.W), REFERENCE.decode.decode(p.pattern, p.values, p.W))
    arguments = (p.pattern, p.values, p.W, p.bias, p.target, 0.7)
    for ours, truth in zip(cpu.decode.decode_residual(*arguments), REFERENCE.decode.decode_residual(*arguments)):
        same(ours, truth)
    same(cpu.gradients.gather_dot(p.pattern, p.A, p.W), REFERENCE.gradients.gather_dot(p.pattern, p.A, p.W))


@needs_numba
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_are_read_in_bfloat16_count_as_what_they_are(shape, cpu):
    p = problem(*shape)
    W, A = p.W.bfloat16(), p.A.bfloat16()
    same(cpu.decode.decode(p.pattern, p.values, W), REFERENCE.decode.decode(p.pattern, p.values, W.float()))
    error, grads, squares = cpu.decode.decode_residual(p.pattern, p.values, W, p.bias, p.target, 0.7)
    truth = REFERENCE.decode.decode_residual(p.pattern, p.values, W.float(), p.bias, p.target, 0.7)
    assert error.dtype == torch.bfloat16
    torch.testing.assert_close(error.float(), truth[0], rtol=2**-8, atol=1e-5)
    same(grads, truth[1])
    same(squares, truth[2])
    columns = cpu.csc.csc(p.pattern)
    same(cpu.gradients.sum_outer(columns, p.values, A), REFERENCE.gradients.sum_outer(columns, p.values, A.float()))
    ours, theirs = rows_of(p), rows_of(p)
    step = AdamStep(1e-3, (0.9, 0.999), 1e-8, 3)
    same(
        cpu.update.update_rows(ours, columns, p.values, A, step),
        REFERENCE.update.update_rows(theirs, columns, p.values, A.float(), step),
    )
    for a, b in zip(ours[:3], theirs[:3]):
        same(a, b)


@needs_numba
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 7), (2050, 33)])
def test_passes_over_rows_are_those_of_torch(shape, cpu):
    g = torch.Generator().manual_seed(0)
    rows, centre, weights = (torch.randn(*size, generator=g) for size in (shape, shape[1:], shape[:1]))
    for low in (False, True):
        for ours, truth in zip(cpu.rows.centred(rows, centre, low), REFERENCE.rows.centred(rows, centre, low)):
            assert (ours is None) == (truth is None)
            if truth is not None:
                assert ours.dtype == truth.dtype
                torch.testing.assert_close(ours, truth)
    for A in (rows, rows.bfloat16()):
        for factors in (None, weights):
            same(cpu.rows.weighted_sum(A, factors), REFERENCE.rows.weighted_sum(A, factors))


@needs_numba
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_columns_are_those_of_a_stable_sort(shape, cpu):
    p = problem(*shape)
    shuffled = p.pattern.indices.flip(0)  # entries of a row come in any order
    for ours, truth in zip(*(o.csc.csc(Pattern(p.pattern.offsets, shuffled, shape[2])) for o in (cpu, REFERENCE))):
        assert torch.equal(ours, truth)
    counts = [o.csc.counts(shuffled, p.values, shape[2]) for o in (cpu, REFERENCE)]
    assert torch.equal(*counts)
    assert int(counts[0].sum()) == int((p.values != 0).sum())


@needs_numba
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", EXTRAS)
def test_compiled_sums_by_feature_equal_the_reference(shape, which, cpu):
    p = problem(*shape)
    extra = extra_of(p, which)
    columns = p.pattern.columns
    truth = REFERENCE.gradients.sum_outer(columns, p.values, p.A, p.W, extra)
    same(cpu.gradients.sum_outer(columns, p.values, p.A, p.W, extra), truth)
    into = torch.full_like(truth, 7.0)
    assert cpu.gradients.sum_outer(columns, p.values, p.A, p.W, extra, out=into) is into
    same(into, truth)
    same(cpu.gradients.sum_over(columns, p.values), REFERENCE.gradients.sum_over(columns, p.values))


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_numba)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", EXTRAS)
def test_the_norm_bound_is_never_below_the_norm(shape, which, name):
    """With what is extra as the training step bounds it; and tight where every feature has one entry."""
    ops = backend(name)
    for seed in range(3):
        p = problem(*shape, seed=seed)
        extra = extra_of(p, which)
        more: Any = torch.zeros(shape[2])
        if extra.at is not None and extra.rows is not None:
            more[extra.at >= 0] += extra.rows.norm(dim=1)[extra.at[extra.at >= 0]]
        if extra.pull is not None:
            more += extra.pull.abs() * p.W.norm(dim=1)
        true = REFERENCE.gradients.sum_outer(p.pattern.columns, p.values, p.A, p.W, extra).square().sum()
        more = more if EXTRAS[which] else None
        bound = ops.gradients.norm_bound(p.pattern.columns, p.values, p.A.norm(dim=1), more)
        assert float(bound) >= float(true) * (1 - 1e-5)
    alone = Pattern(torch.arange(8), torch.arange(7, dtype=torch.int32), 7)
    A, weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.arange(7.0) - 3
    bound = ops.gradients.norm_bound(alone.columns, weights, A.norm(dim=1))
    assert float(bound) == pytest.approx(float((weights[:, None] * A).square().sum()), rel=1e-5)


@needs_numba
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_compiled_adam_equals_the_reference_and_keeps_the_shadow(shape, unit_norm, clip, cpu):
    p = problem(*shape)
    theirs = rows_of(p, shadow=True, unit_norm=unit_norm)
    ours, G = deepcopy(theirs), p.W.flip(0).contiguous()
    step = AdamStep(0.01, (0.9, 0.999), 1e-8, 3)
    projected = [ops.adam.project(rows, G.clone()) for ops, rows in ((cpu, ours), (REFERENCE, theirs))]
    same(*projected)
    cpu.adam.adam_rows(ours, projected[1], step, clip)
    REFERENCE.adam.adam_rows(theirs, projected[1], step, clip)
    for mine, truth in zip(ours[:3], theirs[:3]):
        same(mine, truth)
    assert ours.shadow is not None
    assert torch.equal(ours.shadow, ours.W.bfloat16())  # rounded to the nearest, as torch does it


@needs_numba
def test_the_compiled_first_step_is_the_rate_in_every_direction(cpu):
    """From zero moments Adam moves by ``lr sign(g)``; 1 - 0.999 in float32 would miss it by 2e-5."""
    rows = Rows(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3, 8))
    G = torch.linspace(-3, 4, 24).view(3, 8)
    cpu.adam.adam_rows(rows, G, AdamStep(0.01, (0.9, 0.999), 1e-12, 1))
    torch.testing.assert_close(rows.W, -0.01 * G.sign(), rtol=2e-6, atol=0)


@needs_numba
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("which", EXTRAS)
def test_the_fused_update_is_the_sum_the_projection_and_adam(shape, unit_norm, which, cpu):
    p, step = problem(*shape), AdamStep(0.01, (0.9, 0.999), 1e-8, 2)
    extra = extra_of(p, which)
    theirs = rows_of(p, shadow=True, unit_norm=unit_norm)
    ours = deepcopy(theirs)
    G = REFERENCE.gradients.sum_outer(p.pattern.columns, p.values, p.A, theirs.W, extra)
    REFERENCE.adam.project(theirs, G)
    REFERENCE.adam.adam_rows(theirs, G, step)
    same(cpu.update.update_rows(ours, p.pattern.columns, p.values, p.A, step, extra), G.square().sum(1))
    for mine, truth in zip(ours[:3], theirs[:3]):
        same(mine, truth)
    assert ours.shadow is not None
    assert torch.equal(ours.shadow, ours.W.bfloat16())


@needs_numba
def test_one_and_two_threads_give_the_same_bits(cpu, monkeypatch):
    """Each row, or feature, is summed by one thread in a fixed order."""
    monkeypatch.setattr("unweave.kernels._jit.WORTH_A_THREAD", 1)  # so little is otherwise left to one thread
    p = problem(300, 19, 700, 12)
    step = AdamStep(0.01, (0.9, 0.999), 1e-8, 2)
    results = []
    for n in (1, 2):
        rows = rows_of(p, shadow=True, unit_norm=True)
        with threads(n):
            columns = cpu.csc.csc(p.pattern)
            made = [cpu.decode.decode(p.pattern, p.values, p.W), cpu.gradients.gather_dot(p.pattern, p.A, p.W)]
            made += cpu.decode.decode_residual(p.pattern, p.values, p.W, p.bias, p.target, 0.7)
            made += [cpu.gradients.sum_outer(columns, p.values, p.A, p.W, p.extra)]
            made += [cpu.gradients.sum_over(columns, p.values), cpu.adam.project(rows, p.W.clone())]
            made += [cpu.update.update_rows(rows, columns, p.values, p.A, step, p.extra)]
            cpu.adam.adam_rows(rows, p.W, step)
        results.append([*columns, *made, *rows[:4]])
    for one, two in zip(*results):
        assert torch.equal(one, two)


_FORKED = """
import os, signal, torch
torch.set_num_threads(2)
from unweave.kernels import _jit
from unweave.kernels.decode import cpu
from unweave.kernels.pattern import Pattern
_jit.WORTH_A_THREAD = 1
pattern = Pattern(torch.arange(0, 801, 4), torch.arange(800, dtype=torch.int32) % 50, 50)
def decoded():
    return cpu.decode(pattern, torch.ones(800), torch.ones(50, 16))
torch.mm(torch.ones(2000, 500), torch.ones(500, 2000))  # torch's helper threads are there, and spin
truth = decoded()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(decoded(), truth) else 1)
print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_goes_on_with_threads_of_its_own():
    done = subprocess.run([sys.executable, "-c", _FORKED], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "child 0", done.stdout + done.stderr
