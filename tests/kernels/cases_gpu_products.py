"""The GPU kernels behind a training step against the reference. Run by ``test_gpu.py``, interpreted or on a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.kernels.adam import gpu as adam
from unweave.kernels.adam import reference as adam_reference
from unweave.kernels.adam.reference import AdamStep, Rows
from unweave.kernels.csc import gpu as csc
from unweave.kernels.csc import reference as csc_reference
from unweave.kernels.decode import gpu as decode
from unweave.kernels.decode import reference as decode_reference
from unweave.kernels.gradients import gpu as gradients
from unweave.kernels.gradients import reference as gradients_reference
from unweave.kernels.gradients.reference import Extra
from unweave.kernels.pattern import Pattern
from unweave.kernels.prefixes import gpu as prefixes
from unweave.kernels.prefixes import reference as prefixes_reference
from unweave.kernels.select.reference import select_above
from unweave.kernels.update import gpu as update
from unweave.kernels.update import reference as update_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SHAPES = [(1, 24, 37), (6, 33, 51), (2, 530, 7), (0, 24, 5)]  # rows, width, features
STEP = AdamStep(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, step=3)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pattern_of(n: int, m: int, density: float = 0.1) -> Pattern:
    """Rows of different lengths; the second row, and features divisible by 5, have no entries."""
    scores = torch.rand(n, m, generator=torch.Generator().manual_seed(3))
    scores[1:2], scores[:, ::5] = 0.0, 0.0
    return select_above(scores.to(DEVICE), 1 - density)


def close(found: Tensor, truth: Tensor, atol: float = 2e-5) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth.double(), rtol=1e-5, atol=atol)


def rows_of(m: int, d: int, unit_norm: bool, shadow: bool) -> tuple[Rows, Rows]:
    """Two copies: one for the kernel, one for the reference."""
    W = F.normalize(randn(m, d, seed=5), dim=1)
    first, second = 0.1 * randn(m, d, seed=6), 0.01 * randn(m, d, seed=7).square()
    both = []
    for _ in range(2):
        copy = torch.zeros(m, d, dtype=torch.bfloat16, device=DEVICE) if shadow else None
        both.append(Rows(W.clone(), first.clone(), second.clone(), copy, unit_norm))
    return both[0], both[1]


def check_rows(ours: Rows, truth: Rows) -> None:
    for mine, wanted in ((ours.W, truth.W), (ours.first, truth.first), (ours.second, truth.second)):
        close(mine, wanted, atol=1e-6)
    if ours.shadow is not None:
        # A GPU rounds to the nearest; the interpreter cuts off.
        unit = 2.0**-7 if INTERPRETED else 2.0**-8
        assert ((ours.shadow.float() - ours.W).abs() <= unit * ours.W.abs()).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_and_residual(shape, density, dtype):
    n, d, m = shape
    pattern = pattern_of(n, m, density)
    values, W, b, target = randn(len(pattern.indices)), randn(m, d, seed=1).to(dtype), randn(d), randn(n, d, seed=2)
    close(decode.decode(pattern, values, W), decode_reference.decode(pattern, values.double(), W.double()))
    truth = decode_reference.decode_residual(
        pattern, values.double(), W.double(), b.double(), target.double(), 2 / max(n, 1)
    )
    found = decode.decode_residual(pattern, values, W, b, target, 2 / max(n, 1))
    assert found[0].dtype == dtype
    # An error that is kept in bfloat16 is also what the gradients are made of: each is off by 2^-7 of its own terms.
    off = 2.0**-7 if dtype == torch.bfloat16 else 0.0
    for mine, wanted, atol in zip(found, truth, (2e-5, 2e-4, 2e-3)):
        terms = wanted.abs()
        if wanted is truth[1]:
            terms = (truth[0][pattern.rows] * W.double()[pattern.indices.long()]).abs().sum(1)
        assert ((mine.double() - wanted).abs() <= atol + off * terms + 1e-4 * wanted.abs()).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("fractions", [(1.0,), (0.3, 0.6, 1.0)])
def test_prefixes(shape, density, fractions):
    n, d, m = shape
    pattern = pattern_of(n, m, density)
    values, W, b, target = randn(len(pattern.indices)), randn(m, d, seed=1), randn(d), randn(n, d, seed=2)
    ends = torch.tensor([max(1, round(m * fraction)) for fraction in fractions], device=DEVICE)
    scales = torch.linspace(0.5, 1.5, len(ends), device=DEVICE)
    truth = prefixes_reference.decode_prefixes(
        pattern, values.double(), W.double(), b.double(), target.double(), ends, scales.double()
    )
    for mine, wanted, atol in zip(
        prefixes.decode_prefixes(pattern, values, W, b, target, ends, scales), truth, (2e-4, 2e-3, 2e-2)
    ):
        close(mine, wanted, atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("segment", "extra"), [(512, False), (4, True)])
def test_gradients(shape, segment, extra, monkeypatch):
    monkeypatch.setattr(gradients, "SEGMENT", segment)  # 4: some features are summed in segments
    n, d, m = shape
    pattern = pattern_of(n, m, 0.7)
    values, A, W = randn(len(pattern.indices)), randn(n, d, seed=1), randn(m, d, seed=2)
    close(gradients.gather_dot(pattern, A, W), gradients_reference.gather_dot(pattern, A.double(), W.double()), 1e-4)
    columns = pattern.columns
    truth = gradients_reference.sum_over(columns, values.double())
    close(gradients.sum_over(columns, values), truth)
    lengths, more = A.norm(dim=1), randn(m, seed=4).abs()
    for extra_length in (None, more):
        doubles = (values.double(), lengths.double(), None if extra_length is None else extra_length.double())
        bound = gradients.norm_bound(columns, values, lengths, extra_length)
        close(bound, gradients_reference.norm_bound(columns, *doubles), 1e-3)
    if extra:
        at = torch.full((m,), -1, device=DEVICE)
        at[::3] = torch.arange(len(at[::3]), device=DEVICE)
        parts = Extra(at, randn(len(at[::3]), d, seed=8), randn(m, seed=9))
    else:
        parts = None
    doubled = None if parts is None else Extra(parts.at, parts.rows.double(), parts.pull.double())  # type: ignore
    if n:
        wanted = gradients_reference.sum_outer(columns, values.double(), A.double(), W.double(), doubled)
        close(gradients.sum_outer(columns, values, A, W, parts), wanted)
        out = torch.empty(m, d, device=DEVICE)
        assert gradients.sum_outer(columns, values, A, W, parts, out) is out
        close(out, wanted)
        assert torch.equal(gradients.sum_outer(columns, values, A, W, parts), out)


def test_a_feature_of_many_segments():
    """More entries than a segment, with the size of segments that is used."""
    n, d = 1100, 24
    pattern = select_above(torch.ones(n, 3, device=DEVICE), torch.tensor([0.0, 2.0, 0.0], device=DEVICE))
    values, A = randn(len(pattern.indices)), randn(n, d, seed=1)
    wanted = gradients_reference.sum_outer(pattern.columns, values.double(), A.double())
    close(gradients.sum_outer(pattern.columns, values, A), wanted, 2e-4)


@pytest.mark.parametrize("n_features", [37, 131, 40_000])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_csc(n, n_features):
    pattern = pattern_of(n, n_features, 0.2 if n_features < 1000 else 0.001)
    found = csc.csc(pattern)
    truth = csc_reference.csc(pattern)
    for mine, wanted in zip(found, truth):
        assert mine.dtype == wanted.dtype == torch.long
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("width", [24, 33, 1100])
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("shadow", [False, True])
def test_adam_and_projection(width, unit_norm, shadow):
    ours, truth = rows_of(3, width, unit_norm, shadow)
    G = randn(3, width)
    wanted = adam_reference.project(truth, G.clone())
    mine = G.clone()
    assert adam.project(ours, mine) is mine
    close(mine, wanted)
    adam.adam_rows(ours, wanted, STEP, clip=0.3)
    adam_reference.adam_rows(truth, wanted, STEP, clip=0.3)
    check_rows(ours, truth)


@pytest.mark.parametrize("shape", [(1, 24, 37), (6, 33, 21), (2, 1100, 5)])
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize(("segment", "extra"), [(512, False), (4, True)])
def test_update(shape, unit_norm, segment, extra, monkeypatch):
    """Rows without entries step too: their moments decay, and what is extra counts."""
    monkeypatch.setattr(gradients, "SEGMENT", segment)
    n, d, m = shape
    ours, truth = rows_of(m, d, unit_norm, shadow=True)
    pattern = pattern_of(n, m, 0.7)
    weights, A = randn(len(pattern.indices)), randn(n, d, seed=1)
    at = torch.full((m,), -1, device=DEVICE)
    at[::5] = torch.arange(len(at[::5]), device=DEVICE)
    parts = Extra(at, randn(len(at[::5]), d, seed=8), randn(m, seed=9)) if extra else None
    for step in (1, 2):
        squares = update.update_rows(ours, pattern.columns, weights, A, STEP._replace(step=step), parts)
        wanted = update_reference.update_rows(truth, pattern.columns, weights, A, STEP._replace(step=step), parts)
        close(squares, wanted, 1e-3)
        check_rows(ours, truth)


def test_update_gives_the_same_bits_every_time_and_takes_bfloat16():
    pattern = pattern_of(6, 9, 0.5)
    weights, A = randn(len(pattern.indices)), randn(6, 33, seed=1)
    both = rows_of(9, 33, True, True)
    squares = [update.update_rows(rows, pattern.columns, weights, A, STEP) for rows in both]
    assert torch.equal(squares[0], squares[1])
    assert all(torch.equal(getattr(both[0], name), getattr(both[1], name)) for name in Rows._fields[:4])
    ours, truth = rows_of(9, 33, True, False)
    update.update_rows(ours, pattern.columns, weights, A.bfloat16(), STEP)
    update_reference.update_rows(truth, pattern.columns, weights, A.bfloat16().float(), STEP)
    check_rows(ours, truth)


def test_nan_stays_with_its_feature():
    pattern = pattern_of(6, 37, 0.5)
    weights, A = randn(len(pattern.indices)), randn(6, 24, seed=1)
    feature = int(pattern.indices[0])
    weights[0] = float("nan")
    ours, _ = rows_of(37, 24, True, False)
    squares = update.update_rows(ours, pattern.columns, weights, A, STEP)
    assert squares.isnan().nonzero().flatten().tolist() == [feature]
    assert ours.W.isnan().any(1).nonzero().flatten().tolist() == [feature]


def test_what_is_written_must_be_contiguous_and_what_is_read_need_not():
    ours, truth = rows_of(37, 24, False, False)
    strided = ours._replace(W=randn(24, 37).T)
    pattern = pattern_of(6, 37, 0.5)
    weights, A = randn(len(pattern.indices)), randn(24, 6, seed=1).T
    with pytest.raises(ValueError, match="contiguous"):
        update.update_rows(strided, pattern.columns, weights, A, STEP)
    with pytest.raises(ValueError, match="contiguous"):
        adam.project(strided._replace(unit_norm=True), randn(37, 24))
    update.update_rows(ours, pattern.columns, weights, A, STEP)
    update_reference.update_rows(truth, pattern.columns, weights, A, STEP)
    check_rows(ours, truth)
