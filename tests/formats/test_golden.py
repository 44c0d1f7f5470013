"""Parity: what the real libraries made (``golden/make.py``) computes the same numbers in unweave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unweave import formats
from unweave.errors import UnweaveError

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(p.parent.relative_to(GOLDEN).as_posix() for p in GOLDEN.rglob("expected.safetensors"))
# Architectures that unweave has not, by what the name of a case contains.
LACKING = {
    "glu": "glu encoder",
    "jumprelu_layer_norm": "standardised_jumprelu",
}


def lacking(case: str) -> str | None:
    name = case.split("/")[1].lower()
    return next((needed for part, needed in LACKING.items() if part in name), None)


def open_case(case: str) -> tuple[dict, dict]:
    options = GOLDEN / case / "options.json"
    expected = load_file(GOLDEN / case / "expected.safetensors")
    return expected, json.loads(options.read_text()) if options.is_file() else {}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Measured: the largest relative difference is 1.4e-6 for OMP, whose least squares the library iterates, and else 4e-7.
@pytest.mark.parametrize("case", [c for c in CASES if not lacking(c)])
def test_codes_and_reconstructions_are_the_library_s(case: str) -> None:
    expected, options = open_case(case)
    dictionary = formats.load(GOLDEN / case, **options)
    with torch.no_grad():
        code = dictionary.encode(expected["x"])
        output = dictionary(expected["x"])
    assert torch.equal(code.dense() != 0, expected["code"] != 0)
    assert 0 < int((expected["code"] != 0).sum()) < expected["code"].numel()
    assert relative(code.dense(), expected["code"]) < 1e-5
    assert relative(output, expected["reconstruction"]) < 1e-5


@pytest.mark.parametrize("case", [c for c in CASES if lacking(c)])
def test_what_unweave_has_no_architecture_for_is_named(case: str) -> None:
    _, options = open_case(case)
    facts = formats.inspect(GOLDEN / case, **options)
    assert facts.missing
    assert str(lacking(case)) in facts.missing
    assert facts.n_features == 24
    with pytest.raises(UnweaveError, match="does not load"):
        formats.load(GOLDEN / case, **options)


@pytest.mark.parametrize("case", CASES)
def test_inspect_says_what_load_finds(case: str) -> None:
    _, options = open_case(case)
    facts = formats.inspect(GOLDEN / case, **options)
    assert facts.format == case.split("/")[0]
    assert (facts.d_in, facts.d_out, facts.n_features) == (8, 8, 24)
    assert facts.dtype == "F32"
    if not facts.missing:
        dictionary = formats.load(GOLDEN / case, **options)
        assert dictionary.name == facts.architecture
        assert facts.k is None or dictionary.config.k == facts.k


@pytest.mark.parametrize(
    ("case", "model", "site"),
    [
        ("saelens/standard", "gpt2", "layers.3"),
        ("saelens/flat_standard", "gpt2", "layers.3:input"),
        ("saelens/trained_batchtopk", "gpt2", "layers.3"),
        ("dictionary_learning/trained_BatchTopKSAE", "EleutherAI/pythia-70m", "layers.3"),
        ("sparsify/random/layers.3", None, "layers.3"),
        ("llamascopium/random_relu", None, "layers.3"),
        ("overcomplete/random_jump", None, None),
    ],
)
def test_model_and_site_are_told_or_said_to_be_unknown(case: str, model: str | None, site: str | None) -> None:
    _, options = open_case(case)
    facts = formats.inspect(GOLDEN / case, **options)
    assert (facts.model, facts.site) == (model, site)
    assert (("model", "unknown") in facts.rows()) == (model is None)
