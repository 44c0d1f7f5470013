"""Parity: what the real libraries made (``golden/make.py``) computes the same numbers in unweave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unweave import formats

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(p.parent.relative_to(GOLDEN).as_posix() for p in GOLDEN.rglob("expected.safetensors"))


ONE_FILE = ("gemma-scope", "gemma-scope-2")  # of any name, so what is beside it has to be left out


def place_of(case: str) -> Path:
    if case.split("/")[0] not in ONE_FILE:
        return GOLDEN / case
    (file,) = (p for p in (GOLDEN / case).iterdir() if p.name not in ("expected.safetensors", "options.json"))
    return file


def open_case(case: str) -> tuple[dict, dict]:
    options = GOLDEN / case / "options.json"
    expected = load_file(GOLDEN / case / "expected.safetensors")
    return expected, json.loads(options.read_text()) if options.is_file() else {}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Measured: the largest relative difference is 1.4e-6 for OMP, whose least squares the library iterates, and else 4e-7.
@pytest.mark.parametrize("case", CASES)
def test_codes_and_reconstructions_are_the_library_s(case: str) -> None:
    expected, options = open_case(case)
    dictionary = formats.load(place_of(case), **options)
    with torch.no_grad():
        code = dictionary.encode(expected["x"])
        output = dictionary(expected["x"])
    assert torch.equal(code.dense() != 0, expected["code"] != 0)
    assert 0 < int((expected["code"] != 0).sum()) < expected["code"].numel()
    assert relative(code.dense(), expected["code"]) < 1e-5
    assert relative(output, expected["reconstruction"]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_inspect_says_what_load_finds(case: str) -> None:
    _, options = open_case(case)
    facts = formats.inspect(place_of(case), **options)
    assert facts.format == case.split("/")[0]
    assert (facts.d_in, facts.d_out, facts.n_features) == (8, 8, 24)
    assert facts.dtype == "F32"
    dictionary = formats.load(place_of(case), **options)
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
    facts = formats.inspect(place_of(case), **options)
    assert (facts.model, facts.site) == (model, site)
    assert (("model", "unknown") in facts.rows()) == (model is None)
