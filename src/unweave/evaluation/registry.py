"""Every number an evaluation can hold: its name, its version and how to read it.

The version is stored beside each value, so that a changed definition never silently changes history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unweave.errors import UnweaveError, near_names
from unweave.metrics import VERSIONS


@dataclass(frozen=True)
class Metric:
    """
    Attributes:
        name: the key in ``evaluation.json``.
        version: raised whenever the definition changes.
        better: which way is better; "" where neither is.
        meaning: one line in plain words.
        centre_interval: a bootstrap resample holds only 63 % of the documents, so counts of distinct things (live
            features) come out too low in every resample. The interval of such a metric is moved back onto the value.
    """

    name: str
    version: int
    better: Literal["low", "high", ""]
    meaning: str
    centre_interval: bool = False


METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Make a metric known. A second definition of the same name and version is refused."""
    if METRICS.setdefault(metric.name, metric) != metric:
        raise UnweaveError(f"metric {metric.name!r} is registered already, with another definition")
    return metric


def of(name: str) -> Metric | None:
    """The metric that a number is of, also of one for a part of the rows (``fvu:layers.6``); None if unknown."""
    return METRICS.get(name.partition(":")[0])


def get(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        UnweaveError: for an unknown name, with the near ones.
    """
    if name not in METRICS:
        raise UnweaveError(f"no metric {name!r}: {near_names(name, METRICS)}")
    return METRICS[name]


for _metric in (
    Metric("fvu", VERSIONS["fvu"], "low", "fraction of variance unexplained: identity 0, mean predictor 1"),
    Metric("l0", VERSIONS["l0"], "", "features that fire in a row, mean"),
    Metric("dead_share", VERSIONS["dead_share"], "low", "features that never fired in the evaluated rows", True),
    Metric("dense_share", VERSIONS["dense_share"], "low", "features that fired in more than 10 % of the rows"),
    Metric("cosine", VERSIONS["cosine"], "high", "cosine of a row and its reconstruction, mean"),
    Metric("l2_ratio", VERSIONS["l2_ratio"], "", "length of the reconstruction over length of the row, mean"),
    Metric("relative_bias", VERSIONS["relative_bias"], "", "below 1: outputs are shrunk; 1: no scaling would help"),
    Metric("ce_loss_recovered", 1, "high", "next-token loss kept when spliced: zero ablation 0, untouched model 1"),
    Metric("ce_loss_recovered_mean", 1, "high", "the same with mean ablation as 0"),
    Metric("kl", 1, "low", "KL(clean || spliced) of the next-token distribution, nats a token"),
    Metric("ce_clean", 1, "", "next-token loss of the untouched model, nats a token"),
    Metric("ce_spliced", 1, "low", "next-token loss with the reconstruction spliced in"),
    Metric("ce_zero", 1, "", "next-token loss with zeros spliced in"),
    Metric("ce_mean", 1, "", "next-token loss with the mean row spliced in"),
    Metric("sequence_mse", 1, "low", "squared error a coordinate, mean over each dialogue first, then over dialogues"),
    Metric("special_mse", 1, "low", "the same over the rows of the chat template's own tokens only"),
):
    register(_metric)
