"""Measuring dictionaries: one benchmark per file, every number with an interval, a version and a rival."""

from __future__ import annotations

from unweave.evaluation.baselines import BASELINES
from unweave.evaluation.bootstrap import Estimate, estimate
from unweave.evaluation.evaluate import evaluate
from unweave.evaluation.loss import measure_loss
from unweave.evaluation.registry import METRICS, Metric
from unweave.evaluation.result import Evaluation

__all__ = ["BASELINES", "METRICS", "Estimate", "Evaluation", "Metric", "estimate", "evaluate", "measure_loss"]
