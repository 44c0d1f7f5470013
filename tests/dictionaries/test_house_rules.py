"""Pursuits, ITDA, top-AFA and PolySAE: trained through ``fit``, saved, folded, and encoding rows one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unweave
from unweave.dictionaries import Dictionary, TrainingBatch, build
from unweave.metrics import fvu

OPTIONS = {
    "mp": {"k": 3, "subtract_bias": True},
    "omp": {"k": 3, "tolerance": 0.01},
    "itda": {"k": 3, "tau": 0.05},
    "top_afa": {},
    "poly_topk": {"k": 3},
    "poly_batch_topk": {"k": 3},
    "poly_matryoshka": {"k": 3, "group_fractions": (0.25, 0.75)},
}
ARCHS = list(OPTIONS)


def rows(n: int = 800) -> Tensor:
    """Sums of 3 of 24 directions in 12 dimensions, of norms around 20."""
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(24, 12, generator=generator), dim=1)
    active = torch.rand(n, 24, generator=generator).topk(3, 1).indices
    values = torch.rand(n, 3, generator=generator) + 0.5
    return 12 * torch.zeros(n, 24).scatter_(1, active, values) @ atoms


@pytest.fixture(scope="module", params=ARCHS)
def fitted(request: pytest.FixtureRequest) -> tuple[Dictionary, Tensor]:
    x = rows()
    options = OPTIONS[request.param]
    return unweave.fit(x, request.param, n_features=48, n_rows=150 * 64, batch_size=64, **options), x


# Measured: 0.005 (top_afa, which uses most features) to 0.21 (poly_matryoshka).
def test_it_trains(fitted: tuple[Dictionary, Tensor]) -> None:
    dictionary, x = fitted
    with torch.no_grad():
        assert fvu(x, dictionary(x)) < 0.4


def test_saved_and_loaded_it_gives_identical_codes(fitted: tuple[Dictionary, Tensor], tmp_path) -> None:
    dictionary, x = fitted
    dictionary.save(tmp_path)
    loaded = Dictionary.load(tmp_path)
    ours, theirs = dictionary.encode(x), loaded.encode(x)
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(dictionary(x), loaded(x))


def test_a_row_has_its_code_whoever_else_is_there(fitted: tuple[Dictionary, Tensor]) -> None:
    dictionary, x = fitted
    together = dictionary.encode(x[:40]).dense()
    alone = torch.cat([dictionary.encode(row[None]).dense() for row in x[:40]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)
    assert dictionary.encode(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_folding_the_scale_leaves_outputs_right(arch: str, scale: float) -> None:
    torch.manual_seed(0)
    dictionary = build(arch, 12, 48, **OPTIONS[arch]).double()
    x = rows(200).double() / 20
    dictionary.train()
    dictionary.initialise(x, x)
    for part in x.split(100):
        batch = TrainingBatch(part, part)
        loss = dictionary.loss(batch) if dictionary.learns_by_gradient else dictionary.absorb(batch)
        with torch.no_grad():
            dictionary.after_step(loss, 1.0)
    dictionary.eval()
    before, codes = dictionary(x), dictionary.encode(x)
    dictionary.fold_scale(scale)
    folded = dictionary.encode(x / scale)
    assert torch.equal(folded.indices, codes.indices)
    torch.testing.assert_close(folded.values, codes.values / scale)
    torch.testing.assert_close(dictionary(x / scale), before / scale)


@pytest.mark.parametrize("arch", ["top_afa", "poly_topk"])
def test_folding_two_scales_for_a_target_of_its_own(arch: str) -> None:
    torch.manual_seed(0)
    dictionary = build(arch, 12, 48, d_out=7, subtract_bias=False, **OPTIONS[arch]).double().eval()
    x = rows(50).double() / 20
    before = dictionary(x)
    dictionary.fold_scale(4.0, 0.5)
    torch.testing.assert_close(dictionary(x / 4.0), before / 0.5)
