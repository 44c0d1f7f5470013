"""Intervals: they hold the truth as often as they say, and follow the documents."""

from __future__ import annotations

import math

import numpy as np
import torch

from unweave.codes import SparseCode
from unweave.evaluation import Estimate, estimate
from unweave.metrics import FiringSums, Groups, ReconstructionSums


def sums_of(ratios: torch.Tensor, per_document: int) -> ReconstructionSums:
    """Rows of one dimension whose l2_ratio is ``ratios`` of their document."""
    sums = ReconstructionSums(1, Groups(len(ratios)))
    x = torch.ones(len(ratios) * per_document, 1)
    document = torch.arange(len(ratios)).repeat_interleave(per_document)
    sums.add(x, ratios.repeat_interleave(per_document)[:, None], document)
    return sums


def test_covers_the_truth_at_about_the_nominal_rate():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    n = 300
    for trial in range(n):
        ratios = 1 + torch.rand(50, generator=generator, dtype=torch.float64)  # mean 1.5 in the population
        found = estimate(sums_of(ratios, per_document=7), n_bootstrap=300, seed=trial)["l2_ratio"]
        covered += found.low <= 1.5 <= found.high
    assert 0.90 <= covered / n <= 0.98  # nominal 0.95; a percentile interval of 50 documents falls a little short


def test_more_rows_of_the_same_documents_do_not_narrow_the_interval():
    ratios = 1 + torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    few = estimate(sums_of(ratios, 2))["l2_ratio"]
    many = estimate(sums_of(ratios, 50))["l2_ratio"]
    assert math.isclose(few.high - few.low, many.high - many.low, rel_tol=1e-9)
    expected = 2 * 1.96 * float(ratios.std()) / 40**0.5
    assert math.isclose(few.high - few.low, expected, rel_tol=0.15)


def test_a_ratio_is_worked_out_anew_in_each_resample():
    """fvu against a bootstrap written out row by row."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64) + 5
    y = x + torch.randn(60, 3, generator=generator, dtype=torch.float64)
    sums = ReconstructionSums(3, Groups(20))
    document = torch.arange(60) // 3
    sums.add(x, y, document)
    found = estimate(sums, n_bootstrap=200, seed=3)["fvu"]
    weights = np.random.default_rng(3).multinomial(20, np.full(20, 0.05), size=200)
    values = []
    for row in weights:
        index = torch.cat([torch.arange(60)[document == g].repeat(int(w)) for g, w in enumerate(row)])
        a, b = x[index], y[index]
        values.append(float((a - b).square().sum() / (a - a.mean(0)).square().sum()))
    low, high = np.quantile(values, [0.025, 0.975])
    assert math.isclose(found.low, low, rel_tol=1e-9)
    assert math.isclose(found.high, high, rel_tol=1e-9)


def test_dead_share_lies_inside_its_interval():
    """Every resample misses documents, so it finds more dead features; the interval is moved back onto the value."""
    generator = torch.Generator().manual_seed(4)
    dense = (torch.rand(400, 200, generator=generator) < 0.005).float()
    sums = FiringSums(200, Groups(100))
    sums.add(SparseCode.from_dense(dense), torch.arange(400) // 4)
    found = estimate(sums, n_bootstrap=300)["dead_share"]
    assert 0 < found.low < found.value < found.high < 1


def test_one_document_or_no_resamples_gives_no_interval():
    one = estimate(sums_of(torch.tensor([0.5]), 10))["l2_ratio"]
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(estimate(sums_of(torch.rand(5), 10), n_bootstrap=0)["l2_ratio"].low)


def test_estimates_print_as_many_digits_as_they_deserve():
    assert str(Estimate(0.12345, 0.1201, 0.1267, 1)) == "0.1235 [0.1201, 0.1267]"
    assert str(Estimate(31.9871, 30.1, 33.8, 1)) == "32.0 [30.1, 33.8]"
    assert str(Estimate(math.nan, math.nan, math.nan, 1)) == "-"
    assert str(Estimate(0.0, 0.0, 0.0, 1)) == "0.0000 [0.0000, 0.0000]"
