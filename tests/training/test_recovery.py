"""Training finds a dictionary that was planted in the data, whatever the scale of the data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.dictionaries.toys import planted
from torch import Tensor

import unweave.training
from unweave.metrics import fvu

D, N_ATOMS, N_ACTIVE = 32, 64, 3  # of the planted toy
# The least mean-max-cosine to accept. Measured over 5 seeds: topk 0.997 to 0.999, batch_topk 0.992 to 0.997, jumprelu
# 0.991 to 0.997, relu 0.977 to 0.990; a random dictionary scores 0.40.
EXPECTED = {"topk": 0.98, "batch_topk": 0.98, "jumprelu": 0.98, "relu": 0.95}


def mean_max_cosine(atoms: Tensor, found: Tensor) -> float:
    return float((atoms @ F.normalize(found, dim=1).T).max(1).values.mean())


def options(arch: str) -> dict:
    return {} if arch == "relu" else {"k": N_ACTIVE}


@pytest.mark.parametrize("arch", EXPECTED)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_planted_atoms_are_found(arch: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    atoms, rows = planted(seed)
    found = unweave.training.fit(
        rows, arch, n_features=N_ATOMS, n_rows=900 * 512, batch_size=512, seed=seed, **options(arch)
    )
    score = mean_max_cosine(atoms, found.decoder_directions())
    random = mean_max_cosine(atoms, torch.randn(N_ATOMS, D, generator=torch.Generator().manual_seed(seed + 50)))
    assert score > EXPECTED[arch]
    assert random < 0.5
    with torch.no_grad():
        assert fvu(rows, found(rows)) < (0.75 if arch == "relu" else 0.12)
    assert not caplog.records  # a healthy run says nothing


@pytest.mark.parametrize("arch", EXPECTED)
def test_the_scale_of_the_data_does_not_matter(arch: str) -> None:
    _, rows = planted(3, n=2000)
    settings = {"n_features": 64, "n_rows": 100 * 128, "batch_size": 128, **options(arch)}
    plain = unweave.training.fit(rows, arch, **settings)
    exact = unweave.training.fit(rows * 128, arch, **settings)  # a power of two: the same bits all the way
    assert torch.equal(exact.decoder_directions(), plain.decoder_directions())
    large = unweave.training.fit(rows * 100, arch, **settings)
    cosine = F.cosine_similarity(plain.decoder_directions(), large.decoder_directions())
    assert float(cosine.median()) > 0.99
    with torch.no_grad():
        assert fvu(rows * 128, exact(rows * 128)) == pytest.approx(fvu(rows, plain(rows)), rel=1e-4)
        assert fvu(rows * 100, large(rows * 100)) == pytest.approx(fvu(rows, plain(rows)), rel=0.05)
        a, b = plain.encode(rows), exact.encode(rows * 128)
    assert torch.equal(a.indices, b.indices)
    assert torch.allclose(a.values * 128, b.values, rtol=1e-4)
