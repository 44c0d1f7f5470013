"""AbsTopK: the k features of largest magnitude, of either sign."""

from __future__ import annotations

from unweave.dictionaries.registry import register
from unweave.dictionaries.topk import TopK


@register("abs_topk")
class AbsTopK(TopK):
    """``z = u`` where ``|u|`` is among the row's k largest, else 0: one feature serves both directions of an axis.

    The proximal step of ``||z||_0 <= k``, as TopK is that of ``||z||_0 <= k`` with ``z >= 0`` (see
    :mod:`unweave.dictionaries.proximal`). AuxK too ranks by magnitude. ``batch_abs_topk`` is the form that shares the
    budget out over the batch.
    """

    citation = "Zhu, Khalili, Zhu 2026, AbsTopK: rethinking sparse autoencoders for bidirectional features, ICLR"
    good_for = "concepts with two directions (past and future, more and less) on one axis"
    signed = True
