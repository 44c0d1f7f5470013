"""Nested reconstructions against autograd, and the compiled pass against the plain one."""

import pytest
import torch

from unweave.kernels.pattern import Pattern
from unweave.kernels.prefixes import cpu, reference
from unweave.kernels.select.reference import select_above


def problem(n: int, d: int, m: int, ends: list[int], dtype: torch.dtype, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    pattern = select_above(torch.rand(n, m, generator=g), 0.8)
    values = torch.randn(len(pattern.indices), generator=g, dtype=torch.float64).to(dtype)
    W, b = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((m, d), (d,)))
    target = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    scales = torch.rand(len(ends), generator=g, dtype=torch.float64).to(dtype)
    return pattern, values, W, b, target, torch.tensor(ends), scales


def autograd(pattern: Pattern, values, W, b, target, ends, scales):
    """Loss ``sum_g scale_g / 2 ||x_hat_g - target||^2`` by dense arithmetic."""
    values, W, b = (t.clone().requires_grad_() for t in (values, W, b))
    dense = torch.zeros(pattern.n_rows * pattern.n_features, dtype=W.dtype)
    dense = dense.index_put((pattern.flat,), values).view(pattern.n_rows, pattern.n_features)
    losses = [(dense[:, :end] @ W[:end] + b - target).square().sum(1) for end in ends.tolist()]
    total = sum(s / 2 * loss.sum() for s, loss in zip(scales, losses))
    return torch.autograd.grad(total, (values, W, b)), torch.stack(losses, 1)


@pytest.mark.parametrize(
    "shape", [(7, 5, 24, [3, 8, 24]), (1, 3, 9, [9]), (33, 16, 131, [1, 2, 50, 131]), (0, 4, 8, [8])]
)
def test_prefix_gradients_equal_autograd(shape):
    pattern, *rest = problem(*shape, torch.float64)
    values, W, _, _, ends, _ = rest
    (grad_values, grad_W, grad_b), losses = autograd(pattern, *rest)
    errors, grads, squares = reference.decode_prefixes(pattern, *rest)
    torch.testing.assert_close(squares, losses, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, grad_values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(errors[:, 0].sum(0), grad_b, rtol=1e-10, atol=1e-10)
    at = errors[pattern.rows, reference.group_of(pattern, ends)]
    by_atom = torch.zeros_like(W).index_add_(0, pattern.indices.long(), values[:, None] * at)
    torch.testing.assert_close(by_atom, grad_W, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(70, 33, 200, [10, 37, 200]), (1, 3, 9, [9]), (5, 8, 40, [1, 40])])
@pytest.mark.parametrize("seed", range(3))
def test_the_compiled_pass_equals_the_plain_one(shape, seed):
    pattern, *rest = problem(*shape, torch.float32, seed)
    for ours, plain in zip(cpu.decode_prefixes(pattern, *rest), reference.decode_prefixes(pattern, *rest)):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)


def test_one_prefix_is_the_plain_decode():
    from unweave.kernels.decode.reference import decode_residual

    pattern, values, W, b, target, _, _ = problem(20, 6, 30, [30], torch.float64)
    ends, scales = torch.tensor([30]), torch.tensor([0.1], dtype=torch.float64)
    errors, grads, squares = reference.decode_prefixes(pattern, values, W, b, target, ends, scales)
    error, plain_grads, plain_squares = decode_residual(pattern, values, W, b, target, 0.1)
    torch.testing.assert_close(errors[:, 0], error)
    torch.testing.assert_close(grads, plain_grads)
    torch.testing.assert_close(squares[:, 0], plain_squares)
