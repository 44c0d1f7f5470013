"""Pursuit over the atoms of a dictionary: gradient pursuit as the paper writes it, and what it is worth."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tests.dictionaries.toys import planted
from torch import Tensor

import unweave.training
from unweave.dictionaries import TrainingBatch, build, pursue
from unweave.errors import UnweaveError
from unweave.kernels.pursuit.reference import gradient_pursuit, orthogonal_matching_pursuit


def spelt_out(x: Tensor, D: Tensor, k: int, signed: bool) -> tuple[Tensor, list[float], list[int]]:
    """One row: its dense code, its residual norms before clipping beside those they come from, support sizes."""
    w, active, norms, sizes = torch.zeros(len(D), dtype=x.dtype), set(), [], []
    for _ in range(k):
        r = x - w @ D
        c = D @ r
        active.add(int((c.abs() if signed else c).argmax()))
        g = torch.zeros_like(c)
        g[list(active)] = c[list(active)]
        a = (g @ D) @ r / (g @ D).square().sum()
        norms += [float(r.norm()), float((x - (w + a * g) @ D).norm())]
        w = w + a * g
        w = w if signed else w.relu()
        sizes.append(len(active))
    return w, norms, sizes


@pytest.mark.parametrize("signed", [False, True])
def test_gradient_pursuit_is_the_paper_row_by_row(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 16, generator=generator, dtype=torch.float64)
    D = torch.randn(60, 16, generator=generator, dtype=torch.float64)  # of any norm
    for k in (1, 3, 8):
        pattern, values = gradient_pursuit(x, D, k, signed=signed)
        dense = pattern.densify(values)
        for i in range(len(x)):
            truth, norms, sizes = spelt_out(x[i], D, k, signed)
            torch.testing.assert_close(dense[i], truth)
            assert all(after <= before + 1e-12 for before, after in zip(norms[::2], norms[1::2]))
            assert sizes[0] == 1
            assert all(b - a in (0, 1) for a, b in pairwise(sizes))
            assert int(pattern.offsets.diff()[i]) == sizes[-1]


def test_signed_residuals_never_grow_and_orthogonal_pursuit_is_never_worse() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    D = F.normalize(torch.randn(60, 16, generator=generator, dtype=torch.float64), dim=1)
    before = x.norm(dim=1)
    for k in range(1, 7):
        pattern, values = gradient_pursuit(x, D, k, signed=True)
        left = x - pattern.densify(values) @ D
        assert bool((left.norm(dim=1) <= before + 1e-12).all())
        before = left.norm(dim=1)
        if k <= 2:  # so far both have the same atoms, and least squares is the best there is
            exact, best = orthogonal_matching_pursuit(x, D, k, signed=True)
            assert bool(((x - exact.densify(best) @ D).norm(dim=1) <= before + 1e-12).all())


def test_rows_stop_when_nothing_is_left() -> None:
    D = torch.eye(6, dtype=torch.float64)
    x = torch.tensor([[0.0] * 6, [2.0, 0, 0, 0, 0, 0], [-1.0, 3, 0, 0.5, 0, 0]], dtype=torch.float64)
    pattern, values = gradient_pursuit(x, D, 4)
    torch.testing.assert_close(pattern.densify(values), x.clamp_min(0))
    assert pattern.offsets.diff().tolist() == [0, 1, 2]
    pattern, _ = gradient_pursuit(x, D, 4, tolerance=1.5)
    assert pattern.offsets.diff().tolist() == [0, 1, 1]
    assert len(gradient_pursuit(x[:0], D, 4)[1]) == len(gradient_pursuit(x, D, 0)[1]) == 0


# Squared errors over those of the encoder, seeds 0 to 4: gradient 0.61 to 0.64, matching 0.71 to 0.77, orthogonal 0.47
# to 0.50, with no more features a row than the encoder uses.
@pytest.mark.parametrize("seed", [0, 1])
def test_a_better_search_of_the_same_atoms_finds_better_codes(seed: int) -> None:
    _, rows = planted(seed, n=4000)
    dictionary = unweave.training.fit(
        rows, "batch_topk", n_features=64, k=3, n_rows=200 * 256, batch_size=256, seed=seed
    )
    x = rows[:1000]
    own, errors = dictionary.encode(x), {}
    with torch.no_grad():
        for method in ("gradient", "matching", "orthogonal"):
            code = pursue(dictionary, x, method=method)
            assert bool((code.l0() <= own.l0()).all())
            assert bool((code.values != 0).all())
            errors[method] = float((x - dictionary.decode(code)).square().sum())
        errors["encoder"] = float((x - dictionary.decode(own)).square().sum())
    assert errors["orthogonal"] < errors["gradient"] < errors["matching"] < errors["encoder"]
    assert errors["gradient"] < 0.8 * errors["encoder"]


def test_codes_are_in_the_units_of_the_dictionary_and_budgets_may_differ() -> None:
    torch.manual_seed(0)
    dictionary = build("relu", 12, 40).double().eval()  # atoms of norm 0.1
    with torch.no_grad():
        dictionary.b_dec.normal_()
    x = torch.randn(30, 12, dtype=torch.float64)
    unit = F.normalize(dictionary.W_dec.detach(), dim=1)
    pattern, values = gradient_pursuit(x - dictionary.b_dec, unit, 4)
    code = pursue(dictionary, x, 4)
    torch.testing.assert_close(code.dense() * 0.1, pattern.densify(values))
    budgets = torch.arange(30) % 5
    mixed = pursue(dictionary, x, budgets)
    assert bool((mixed.l0() <= budgets).all())
    for budget in range(5):
        own = budgets == budget
        torch.testing.assert_close(mixed.dense()[own], pursue(dictionary, x[own], budget).dense())
    assert pursue(dictionary, x[:0], 3).shape == (0, 40)
    assert bool((pursue(dictionary, x, 6, signed=True).values < 0).any())


def test_a_transcoder_is_searched_for_its_target() -> None:
    torch.manual_seed(0)
    dictionary = build("topk", 12, 40, d_out=7, subtract_bias=False, k=3)
    dictionary.loss(TrainingBatch(torch.randn(5, 12), torch.randn(5, 7)))
    assert pursue(dictionary, torch.randn(5, 7), 3).shape == (5, 40)
    with pytest.raises(UnweaveError, match=r"expected rows of shape \(n, 7\), found \(5, 12\)"):
        pursue(dictionary, torch.randn(5, 12), 3)
    with pytest.raises(UnweaveError, match="expected rows of width 12"):
        pursue(dictionary, torch.randn(5, 7))


def test_what_cannot_be_pursued_is_refused() -> None:
    dictionary = build("topk", 12, 40, k=3)
    x = torch.randn(5, 12)
    with pytest.raises(UnweaveError, match="expected method 'gradient', 'matching' or 'orthogonal', found 'greedy'"):
        pursue(dictionary, x, 3, method="greedy")  # type: ignore[arg-type]
    with pytest.raises(UnweaveError, match="expected k, how many atoms to pick, to be 0 or more, found -1"):
        pursue(dictionary, x, -1)
    with pytest.raises(UnweaveError, match="expected finite numbers"):
        pursue(dictionary, x.index_fill(0, torch.tensor([2]), torch.nan), 3)
    curved = type("Curved", (type(dictionary),), {"linear_decoder": False, "name": "curved"})(dictionary.config)
    with pytest.raises(UnweaveError, match="curved: its decoder is not linear"):
        pursue(curved, x, 3)
    for arch in ("standardised_topk", "skip_transcoder"):
        with pytest.raises(UnweaveError, match=f"{arch}: what it puts out depends on its input beside the code"):
            pursue(build(arch, 12, 40, k=3), x, 3)
