"""Selection: which entries of the dense scores become the code. The rules are data; each backend carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from unweave.kernels.pattern import Pattern


@dataclass(frozen=True)
class TopKRule:
    """The ``k`` largest of each row; by absolute value where ``signed``."""

    k: int
    signed: bool = False


@dataclass(frozen=True)
class BatchTopKRule:
    """The ``k n`` largest positive ones of a batch of ``n`` rows. ``bound`` is a guess of the smallest kept."""

    k: int
    bound: float | None = None


@dataclass(frozen=True)
class AboveRule:
    """Everything above a threshold: a number, or one per feature. ``expected`` entries a row.

    ``fine``: what is done with the scores tells apart what bfloat16 rounds to the same number, so that candidates are
    worked out in float32 even where a plan takes bfloat16 scores as they are.
    """

    threshold: Tensor | float
    expected: float = 64.0
    fine: bool = False


Rule = TopKRule | BatchTopKRule | AboveRule


class Exact(NamedTuple):
    """What rough scores were made from, so that candidates can be worked out again in float32.

    ``X (n, d)``, ``W (n_features, d)``, the screen to consult and teach, and ``lengths (n,)``: a row's scores are taken
    to be wrong by at most ``screen.tolerance * lengths``.
    """

    X: Tensor
    W: Tensor
    lengths: Tensor
    screen: Any  # a Screen, or what stands for it on a GPU


def select(
    ops: Any, rule: Rule, scores: Tensor, shift: Tensor | None = None, exact: Exact | None = None
) -> tuple[Pattern, Tensor]:
    """The entries of ``scores + shift`` that ``rule`` takes, and their values ``(nnz,)``.

    Args:
        ops: the module that carries it out: ``select.reference``, ``select.cpu`` or ``select.gpu``.
        scores: ``(n, n_features)``; bfloat16 ones are taken as they are, or with ``exact`` as a screen.
        shift: ``(n_features,)``, or None for zero (with the reference only).
    """
    if isinstance(rule, TopKRule):
        return ops.topk(scores, shift, rule.k, signed=rule.signed, exact=exact)
    if isinstance(rule, BatchTopKRule):
        return ops.batch_topk(scores, shift, rule.k * len(scores), bound=rule.bound, exact=exact)
    return ops.above(scores, shift, rule.threshold, exact=exact, expected=rule.expected)
