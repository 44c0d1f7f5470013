"""The checks themselves: each can fail, and says how; and they can be run in every way that is promised."""

from __future__ import annotations

from unittest import SkipTest

import pytest
import torch
from unweave_sample import mutants

from unweave.errors import UnweaveError
from unweave.testing import (
    CHECKS,
    Case,
    ConformanceError,
    architecture_checks,
    check_architecture,
    parametrize_with_checks,
)


def test_every_check_has_a_mutant():
    assert set(mutants.MUTANTS) == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_finds_its_mutant(name: str):
    kind, message = mutants.MUTANTS[name]
    (bound,) = architecture_checks(kind, only=[name])
    with pytest.raises(ConformanceError) as failure:
        bound()
    text = str(failure.value)
    assert message in text
    assert text.startswith(f"{bound.case.kind.name}, {name} (")


def test_every_check_has_a_meaning_in_one_sentence():
    assert all(c.meaning.endswith(".") or c.meaning.endswith(").") for c in CHECKS.values())
    assert 30 <= len(CHECKS) <= 50


def test_what_is_not_claimed_is_not_asked():
    names = {bound.check.name for bound in architecture_checks("unweave_sample.tied:Curved")}
    assert "decoder_is_linear" not in names
    assert "closed_form_agrees_with_autograd" not in names
    assert "works_in_bfloat16" not in names
    names = {bound.check.name for bound in architecture_checks("matryoshka", {"group_fractions": (0.5, 0.5)})}
    assert "features_can_be_permuted" not in names
    names = {bound.check.name for bound in architecture_checks("unweave_sample.centroids:Centroids")}
    assert "every_parameter_gets_a_gradient" not in names
    assert "fold_scale_puts_codes_in_units_of_the_target" not in names


def test_one_call_reports_all_failures():
    report = check_architecture("unweave_sample.tied:Tied")
    assert not report.failed
    assert len(report.passed) > 30
    assert "d_in == d_out" in report.skipped["fold_scale_takes_a_target_of_its_own"]
    assert "checks passed, 0 failed" in str(report)
    with pytest.raises(ConformanceError) as failure:
        check_architecture(mutants.Unfolded)
    text = str(failure.value)
    assert "2 failed" in text
    assert "fold_scale_keeps_outputs" in text
    assert "fold_scale_puts_codes_in_units_of_the_target" in text


def test_an_architecture_that_cannot_be_trained_fails_with_the_reason():
    class Case_(Case):
        def stream(self):
            raise UnweaveError("no rows today")

    (bound,) = architecture_checks(Case_("topk"), only=["codes_are_valid"])
    with pytest.raises(ConformanceError, match="stopped with UnweaveError: no rows today"):
        bound()


def test_checks_are_chosen_by_name():
    everything = architecture_checks("topk")
    without = architecture_checks("topk", leave_out=["saves_and_loads"])
    assert len(without) == len(everything) - 1
    with pytest.raises(UnweaveError, match="no check 'saves_and_load': did you mean 'saves_and_loads'"):
        architecture_checks("topk", only=["saves_and_load"])
    with pytest.raises(UnweaveError, match="no architecture 'top'"):
        architecture_checks("top")


def test_checks_leave_the_random_state_alone():
    before = torch.get_rng_state()
    for bound in architecture_checks("topk", only=["codes_are_valid", "resumes_with_the_same_bits"]):
        bound()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_check_that_does_not_apply_here_is_skipped_not_passed():
    (bound,) = architecture_checks("relu", only=["sparsity_is_honoured"])
    with pytest.raises(SkipTest, match="takes no k"):
        bound()


@parametrize_with_checks([Case("topk", {"k": 5}, d=10, n_features=30)])
def test_other_sizes_do_as_well(check):
    assert check.case.build().config.k == 5
    check()
