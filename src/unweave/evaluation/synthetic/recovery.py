"""How much of the planted a dictionary finds again, beside the dictionary that knows it all and one of random atoms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary
from unweave.errors import UnweaveError
from unweave.evaluation.bootstrap import Estimate
from unweave.evaluation.registry import METRICS, Metric, register
from unweave.evaluation.result import Evaluation
from unweave.evaluation.synthetic.matching import Match, match
from unweave.evaluation.synthetic.source import Sample, SyntheticSource
from unweave.kernels.decode.reference import decode
from unweave.kernels.pursuit.reference import orthogonal_matching_pursuit
from unweave.kernels.select.reference import select_topk
from unweave.metrics import ReconstructionSums

_ROWS = 1024  # at a time

for _metric in (
    Metric("mmcs", 1, "high", "largest |cosine| of a planted direction with an atom, mean over the planted"),
    Metric("mcc", 1, "high", "|cosine| of planted directions and atoms paired one to one, mean over pairs"),
    Metric("mcc_codes", 1, "high", "correlation of the activations of such a pair, mean over pairs"),
    Metric("recall", 1, "high", "planted directions that an atom has |cosine| 0.9 or more with"),
    Metric("uniqueness", 1, "high", "planted directions whose nearest atom is not another's nearest too"),
    Metric("distinct_share", 1, "high", "different planted directions that atoms are nearest to, over the atoms"),
    Metric("firing_f1", 1, "high", "F1 of the paired feature firing where the planted one does, mean over pairs"),
    Metric("firing_precision", 1, "high", "rows in which the planted one fires, of those in which its pair does"),
    Metric("firing_recall", 1, "high", "rows in which its pair fires, of those in which the planted one does"),
    Metric(
        "shrinkage", 1, "", "slope of found on planted magnitudes where both fire, mean over pairs; 1: no shrinkage"
    ),
):
    register(_metric)


@dataclass(frozen=True)
class Recovery(Evaluation):
    """What :func:`recover` returns: an evaluation whose rivals are the anchors.

    ``baselines`` holds "oracle" (true atoms and true codes), "oracle atoms" (true atoms, codes by orthogonal matching
    pursuit: what a sparse encoder can do that knows every direction) and "random" (as many random atoms as the
    dictionary has). None of the numbers has an interval: over rows they hardly vary; over seeds of the world and of
    training they do, so run several.

    Attributes:
        match: which feature is which. f1, correlation, slope: ``(p,)`` float64, pair by pair; nan where not defined.
    """

    match: Match | None = field(default=None, repr=False)
    f1: np.ndarray | None = field(default=None, repr=False)
    correlation: np.ndarray | None = field(default=None, repr=False)
    slope: np.ndarray | None = field(default=None, repr=False)

    __repr__ = Evaluation.__repr__

    def caption(self) -> str:
        d = self.data
        return (
            f"{d.get('n_true', 0):,} planted features, {d.get('n_found', 0):,} found; {d.get('n_rows', 0):,} rows; "
            f"the random atoms code with {d.get('random_l0')} a row"
        )


def recover(
    dictionary: Dictionary,
    source: SyntheticSource,
    *,
    n_rows: int = 16_384,
    absolute: bool = True,
    threshold: float = 0.9,
    seed: int = 0,
) -> Recovery:
    """Compare a dictionary with what was planted in the rows of ``source``.

    Features are paired one to one by the cosine of their directions (Hungarian method). Numbers about pairs are means
    over ``min(planted, found)`` pairs; those about the planted (mmcs, recall, uniqueness) over all planted ones.
    A pair's activations are compared as what they write (value times length of the atom, turned round where the
    cosine is negative), so that scale moved between code and atom changes nothing. What is not defined (a feature
    that never fires) counts 0 in F1, precision, recall and correlation, as in SynthSAEBench, except that pairs whose
    planted feature never fired in these rows are left out; slopes are averaged where both fired.

    Args:
        dictionary: for raw rows, as training returns it; used in eval mode.
        source: the world it was trained on; compared on rows that it never gave (``source.held_out()``).
        absolute: pair by absolute cosine. threshold: the cosine that counts in ``recall``.
        seed: of the random atoms.

    Raises:
        UnweaveError: when widths differ.
    """
    if (dictionary.d_in, dictionary.d_out) != (source.d_in, source.d_out):
        raise UnweaveError(
            f"recover: the dictionary takes width {dictionary.d_in} to {dictionary.d_out}, the rows have {source.d_in}"
        )
    fresh, world = source.held_out(), source.world

    def batches() -> Iterator[Sample]:
        return (fresh.sample(min(_ROWS, n_rows - i), i) for i in range(0, n_rows, _ROWS))

    def comparison(directions: Tensor, code_of: Callable[[Sample], tuple[SparseCode, Tensor]]) -> _Comparison:
        made = _Comparison(match(world.directions, directions, absolute=absolute), directions, threshold)
        for sample in batches():
            made.add(sample, *code_of(sample))
        return made

    def by_dictionary(sample: Sample) -> tuple[SparseCode, Tensor]:
        x = dictionary.check_input(sample.rows)
        code = dictionary.encode(x)
        return code, dictionary.reconstruct(x, code)

    def written(code: SparseCode, directions: Tensor) -> Tensor:
        return decode(code.pattern, code.values, directions) + world.offset

    def by_pursuit(sample: Sample) -> tuple[SparseCode, Tensor]:
        # Knows when to stop, too: at the noise, and at the largest number of features that fired together.
        most, noise, signed = int(sample.code.l0().max()), source.config.noise, source.config.signed
        x = sample.rows - world.offset
        pattern, values = orthogonal_matching_pursuit(x, world.directions, most, signed=signed, tolerance=noise or None)
        code = SparseCode.from_pattern(pattern, values)
        return code, written(code, world.directions)

    def by_random(sample: Sample) -> tuple[SparseCode, Tensor]:
        scores = (sample.rows - world.offset) @ random.T
        pattern = select_topk(scores.abs(), random_l0)
        code = SparseCode.from_pattern(pattern, scores.reshape(-1)[pattern.flat])
        return code, written(code, random)

    was_training = dictionary.training
    dictionary.eval()
    try:
        with torch.no_grad():
            found = comparison(dictionary.decoder_directions(), by_dictionary)
            values = found.values()
            random_l0 = max(1, min(dictionary.n_features, round(values["l0"])))
            generator = torch.Generator().manual_seed(seed)
            random = F.normalize(torch.randn(dictionary.n_features, source.d_out, generator=generator), dim=1)
            anchors = {
                "oracle": comparison(world.directions, lambda s: (s.code, written(s.code, world.directions))),
                "oracle atoms": comparison(world.directions, by_pursuit),
                "random": comparison(random, by_random),
            }
    finally:
        dictionary.train(was_training)
    data = {
        "n_rows": n_rows,
        "n_true": source.config.n_features,
        "n_found": dictionary.n_features,
        "random_l0": random_l0,
        "threshold": threshold,
        "source": fresh.provenance,
    }
    return Recovery(
        _estimates(values),
        {name: _estimates(anchor.values()) for name, anchor in anchors.items()},
        data,
        found.match,
        **found.by_pair(),
    )


def _estimates(values: dict[str, float]) -> dict[str, Estimate]:
    return {name: Estimate(value, math.nan, math.nan, METRICS[name].version) for name, value in values.items()}


class _Comparison:
    """Sums over rows of what each pair's activations have in common."""

    def __init__(self, match: Match, directions: Tensor, threshold: float) -> None:
        self.match, self.threshold = match, threshold
        lengths = directions.detach().cpu().double().norm(dim=1)[match.found]
        self._writes = (lengths * torch.where(match.cosine < 0, -1.0, 1.0)).numpy()
        self._n, self._entries = 0, 0
        self._sums: dict[str, Any] = {}
        self._reconstruction = ReconstructionSums(directions.shape[1])

    def add(self, sample: Sample, code: SparseCode, reconstruction: Tensor) -> None:
        code = code.detach().nonzero().to("cpu", torch.float64)
        true = sample.code.to(dtype=torch.float64).to_scipy()[:, self.match.true.numpy()]
        found = code.to_scipy()[:, self.match.found.numpy()]
        fires, found_fires = true.astype(bool).astype(float), found.astype(bool).astype(float)
        columns = {
            "a": true,
            "b": found,
            "aa": true.multiply(true),
            "bb": found.multiply(found),
            "ab": true.multiply(found),
            "aa_both": true.multiply(true).multiply(found_fires),
            "fires": fires,
            "found_fires": found_fires,
            "both": fires.multiply(found_fires),
        }
        for name, matrix in columns.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.asarray(matrix.sum(0)).ravel()
        self._n += len(sample.rows)
        self._entries += code.nnz
        self._reconstruction.add(sample.rows, reconstruction.to(sample.rows))

    def by_pair(self) -> dict[str, np.ndarray]:
        s, n = self._sums, self._n
        with np.errstate(divide="ignore", invalid="ignore"):
            covariance = s["ab"] - s["a"] * s["b"] / n
            variances = (s["aa"] - s["a"] ** 2 / n) * (s["bb"] - s["b"] ** 2 / n)
            correlation = np.sign(self._writes) * covariance / np.sqrt(np.maximum(variances, 0))
            return {
                "f1": _where(s["fires"], 2 * s["both"] / (s["fires"] + s["found_fires"])),
                "correlation": _where(s["fires"], np.nan_to_num(correlation, posinf=0.0, neginf=0.0)),
                "slope": _where(s["both"], s["ab"] * self._writes / s["aa_both"]),
            }

    def values(self) -> dict[str, float]:
        s, pairs, match = self._sums, self.by_pair(), self.match
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = _where(s["fires"], np.nan_to_num(s["both"] / s["found_fires"]))
            recall = _where(s["fires"], s["both"] / s["fires"])
        return {
            "mmcs": match.mmcs,
            "mcc": match.mcc,
            "mcc_codes": _mean(pairs["correlation"]),
            "recall": match.recall(self.threshold),
            "uniqueness": match.uniqueness,
            "distinct_share": match.distinct_share,
            "firing_f1": _mean(pairs["f1"]),
            "firing_precision": _mean(precision),
            "firing_recall": _mean(recall),
            "shrinkage": _mean(pairs["slope"]),
            "fvu": self._reconstruction.values()["fvu"],
            "l0": self._entries / max(1, self._n),
        }


def _where(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(counts > 0, values, np.nan)


def _mean(values: np.ndarray) -> float:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else math.nan
