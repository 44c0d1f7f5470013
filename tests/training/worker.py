"""Trains a tiny dictionary of each architecture named, one after another; a test kills this process on the way.

Run as ``python worker.py FOLDER ARCH ...``. Every log line is announced on stdout as ``arch step``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from unweave import dictionaries
from unweave.activations import RowStream
from unweave.sources.arrays import ArraySource
from unweave.training import TrainingConfig, train

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "jumprelu": {"target_l0": 3.0},
    "relu": {},
}
# A log window and a checkpoint distance that do not divide each other, nor the number of steps; few rows of silence
# make a dead feature, so that AuxK and its counters matter.
CONFIG = TrainingConfig(
    n_rows=150 * 64, batch_size=64, ring_rows=512, log_every=4, checkpoint_every=7, seed=5, dead_after=640
)


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2000, 24, generator=generator) @ torch.randn(24, 24, generator=generator) + 3


def make(arch: str) -> dictionaries.Dictionary:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return dictionaries.build(arch, d_in=24, n_features=48, **ARCHITECTURES[arch])


def stream() -> RowStream:
    return RowStream(ArraySource(rows(), batch_rows=100), seed=3)


class Announce:
    """A tracker that says where training is."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def start(self, run_id: str, config: dict[str, Any], folder: Path | None) -> None: ...

    def log(self, metrics: dict[str, Any], step: int) -> None:
        print(self.arch, step, flush=True)
        time.sleep(0.005)  # gives the test time to kill where it wants to

    def finish(self) -> None: ...


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        train(make(name), stream(), CONFIG, Path(sys.argv[1]) / name, trackers=Announce(name))
