"""The plain PyTorch kernels against dense arithmetic and autograd, in float64."""

import pytest
import torch

from unweave.kernels.autograd import sparse_decode, sparse_encode
from unweave.kernels.decode.reference import decode
from unweave.kernels.gradients import reference
from unweave.kernels.gradients.reference import gather_dot, scatter_outer, sum_by_feature
from unweave.kernels.pattern import Pattern
from unweave.kernels.select.reference import select_above, select_batch_topk, select_topk

SHAPES = [(1, 3, 5), (7, 4, 13), (33, 16, 257), (64, 8, 40)]


def random_pattern(n: int, m: int, density: float, seed: int = 0) -> Pattern:
    generator = torch.Generator().manual_seed(seed)
    return select_above(torch.rand(n, m, generator=generator), 1 - density)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("sampled", [True, False])
def test_products_equal_dense_ones(shape, density, sampled, monkeypatch):
    n, d, m = shape
    monkeypatch.setattr(reference, "_has_sampled_product", lambda A: sampled)
    torch.manual_seed(0)
    pattern = random_pattern(n, m, density)
    values = torch.randn(len(pattern.indices), dtype=torch.float64)
    A, W = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    dense = pattern.densify(values)
    torch.testing.assert_close(decode(pattern, values, W), dense @ W, rtol=0, atol=1e-12)
    torch.testing.assert_close(scatter_outer(pattern, values, A), dense.T @ A, rtol=0, atol=1e-12)
    torch.testing.assert_close(gather_dot(pattern, A, W), (A @ W.T).reshape(-1)[pattern.flat], rtol=0, atol=1e-12)
    torch.testing.assert_close(sum_by_feature(pattern, values), dense.sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 100])
def test_autograd_functions_equal_autograd(shape, k):
    n, d, m = shape
    torch.manual_seed(1)
    x, W_enc, b_enc, W_dec = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((n, d), (m, d), (m,), (m, d))
    )
    inputs = (x, W_enc, b_enc, W_dec)
    scores = x @ W_enc.T + b_enc
    pattern = select_topk(scores.detach(), k)
    values = sparse_encode(x, W_enc, b_enc, scores.detach(), pattern)
    ours = torch.autograd.grad(sparse_decode(values.relu(), W_dec, pattern).square().sum(), inputs)
    mask = pattern.densify(torch.ones_like(values))
    truth = torch.autograd.grad(((scores.relu() * mask) @ W_dec).square().sum(), inputs)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_topk_selects_the_largest_and_allows_k_above_width():
    scores = torch.tensor([[1.0, 5.0, 3.0], [9.0, -1.0, 2.0]])
    pattern = select_topk(scores, 2)
    assert [set(pattern.indices[i : i + 2].tolist()) for i in (0, 2)] == [{1, 2}, {0, 2}]
    assert len(select_topk(scores, 10).indices) == 6


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("skewed", [False, True])
def test_batch_topk_is_exact_also_when_the_sampled_rows_mislead(seed, skewed):
    torch.manual_seed(seed)
    scores = torch.randn(200, 97)
    if skewed:
        scores[::6] += 10  # the sample is every sixth row here
    pattern = select_batch_topk(scores, 5)
    flat = scores.reshape(-1)
    truth = flat.topk(1000).indices
    assert set(pattern.flat.tolist()) == set(truth[flat[truth] > 0].tolist())


def test_batch_topk_keeps_only_positive_scores_and_handles_ties():
    assert len(select_batch_topk(-torch.ones(4, 6), 2).indices) == 0
    assert len(select_batch_topk(torch.ones(4, 6), 2).indices) == 8
    assert len(select_batch_topk(torch.zeros(0, 6), 2).indices) == 0


def test_select_above_takes_a_threshold_per_feature():
    scores = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    pattern = select_above(scores, torch.tensor([0.5, 2.0]))
    assert pattern.offsets.tolist() == [0, 1, 3]
    assert pattern.indices.tolist() == [0, 0, 1]


def test_columns_sort_by_feature_and_keep_row_order():
    pattern = Pattern(torch.tensor([0, 2, 2, 4]), torch.tensor([3, 1, 1, 0], dtype=torch.int32), 5)
    starts, rows, order = pattern.columns
    assert starts.tolist() == [0, 1, 3, 3, 4, 4]
    assert rows.tolist() == [2, 0, 2, 0]
    assert order.tolist() == [3, 1, 2, 0]
