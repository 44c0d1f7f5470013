"""Our side of the benchmarks keeps working as the library changes; the peers have an environment of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from unweave.kernels.backend import why_not

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.skipif(why_not("cpu") is not None, reason="numba is not installed (pip install numba)"),
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks come with the repository, not with the package"),
]


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("UNWEAVE_KERNELS", "reference")  # restored afterwards: the adapters set it
    from peers import ours  # pyright: ignore[reportMissingImports]

    return ours


@pytest.mark.parametrize("arch", ["TopK", "BatchTopK", "JumpReLU"])
def test_every_engine_trains_and_encodes_as_the_benchmark_asks(ours, arch):
    from peers.base import Setup  # pyright: ignore[reportMissingImports]

    g = torch.Generator().manual_seed(0)
    rows = (torch.rand(512, 40, generator=g) * (torch.rand(512, 40, generator=g) < 0.1)) @ torch.randn(
        40, 24, generator=g
    )
    setup = Setup.make(rows, 96, 4, 128, 1e-3)
    losses = {}
    for engine in ours.ENGINES:
        peer = ours.Unweave(setup, arch, engine)
        before = float((peer.reconstruct(rows) - rows).square().sum())
        for step in range(40):
            peer.train_step(rows[128 * (step % 4) : 128 * (step % 4 + 1)])
        losses[engine] = float((peer.reconstruct(rows) - rows).square().sum()) / before
        assert len(peer.encode(rows)) == 512
    assert max(losses.values()) < 0.9
    for loss in losses.values():
        assert loss == pytest.approx(losses["autograd"], rel=0.05)  # JumpReLU in bfloat16: 2.6 % away


def test_the_ring_serves_rows_of_the_producer(ours):
    rows = torch.randn(1000, 8)
    ring = ours.shuffle_ring(rows, capacity=512, batch_size=64, chunk=100)
    found = ring.next()[0]
    assert found.shape == (64, 8)
    assert bool((found[:, None] == rows).all(2).any(1).all())
