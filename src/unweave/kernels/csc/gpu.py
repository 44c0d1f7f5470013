"""Sort the entries of a CSR pattern by feature on a GPU: a stable radix sort, which is count, scan and scatter.

No kernel of ours: a scatter of our own would need either atomics, whose order differs from run to run, or a table of
blocks by features that for 131,072 features outgrows the entries. torch's stable sort (CUB's radix sort) keeps entries
of a feature in row order and always gives the same bits; two-byte keys halve its passes. Starts come from a binary
search in the sorted keys rather than from ``bincount``, which adds atomically and waits for the device.
"""

from __future__ import annotations

import torch

from unweave.kernels.csc.reference import Columns
from unweave.kernels.csc.reference import counts as counts
from unweave.kernels.pattern import Pattern

_SHORT = 1 << 15


def csc(pattern: Pattern) -> Columns:
    """As :func:`unweave.kernels.csc.reference.csc`, without waiting for the device."""
    indices, n_features = pattern.indices, pattern.n_features
    keys, order = (indices.short() if n_features <= _SHORT else indices).sort(stable=True)
    edges = torch.arange(n_features + 1, dtype=torch.int32, device=indices.device)
    return Columns(torch.searchsorted(keys.int(), edges), pattern.rows[order], order)
