"""Synthetic ground truth: rows made of planted features, and how much of the planted a dictionary finds again."""

from __future__ import annotations

from unweave.evaluation.synthetic.config import Hierarchy, SyntheticConfig, bench_toy, tree_toy
from unweave.evaluation.synthetic.matching import Match, match
from unweave.evaluation.synthetic.recovery import Recovery, recover
from unweave.evaluation.synthetic.source import Sample, SyntheticSource
from unweave.evaluation.synthetic.world import World

__all__ = [
    "Hierarchy",
    "Match",
    "Recovery",
    "Sample",
    "SyntheticConfig",
    "SyntheticSource",
    "World",
    "bench_toy",
    "match",
    "recover",
    "tree_toy",
]
