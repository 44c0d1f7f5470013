"""Pursuit: codes picked one atom at a time, each the best match of what the earlier ones left of the row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.kernels.pattern import Pattern


@dataclass
class Screening:
    """How a screened pursuit goes about it, and what it did.

    Attributes:
        n_candidates: a row, that it picks among; ``8 k + 64`` if None.
        caution: the correlation between an atom and the way the residual has gone since the last product with all atoms
            that is reckoned with: 0 with none, 1 with any there can be, so that every pick is exact. If None,
            ``5 / sqrt(d)``, which is beyond that of random atoms, between 0.2 and 1. With 0.2, at d = 576 and k = 32,
            9 products a row gave every support of exact pursuit on dictionaries of random atoms and of data rows.
        n_products: rows that were multiplied by all atoms, counted every time; the residual method does ``n_picks``.
        n_picks: picks, of an atom picked before too.
        n_proven: picks that no atom beyond the candidates can have been better than.
    """

    n_candidates: int | None = None
    caution: float | None = None
    n_products: int = 0
    n_picks: int = 0
    n_proven: int = 0

    @property
    def proven_share(self) -> float:
        return self.n_proven / max(1, self.n_picks)


def noise(dtype: torch.dtype) -> float:
    """The largest correlation, per unit of row norm, that is taken for zero: what rounding leaves of a row all used up.

    Without it a row that a few atoms explain entirely would go on to pick k atoms for their rounding errors.
    """
    return 16 * torch.finfo(dtype).eps


def dependence(dtype: torch.dtype) -> float:
    """The share of an atom's squared norm outside the span of others below which it counts as lying in that span."""
    return 64 * torch.finfo(dtype).eps


def check(
    x: Tensor,
    W: Tensor,
    k: int,
    tolerance: float | None,
    trail: Tensor | None = None,
    *,
    look_at_atoms: bool = True,
) -> None:
    """Refuse what pursuit cannot work on; clear the trail, if there is one.

    Raises:
        UnweaveError: for shapes, types or devices that do not fit, numbers that are not finite, a negative k.
    """
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        raise UnweaveError(f"pursuit: expected x (n, d) and W (m, d), found {tuple(x.shape)} and {tuple(W.shape)}")
    if x.dtype != W.dtype or not x.is_floating_point() or x.device != W.device:
        raise UnweaveError(
            "pursuit: expected x and W of one floating type on one device, "
            f"found {x.dtype} on {x.device} and {W.dtype} on {W.device}"
        )
    if k < 0:
        raise UnweaveError(f"pursuit: expected k, how many atoms to pick, to be 0 or more, found {k}")
    if tolerance is not None and not tolerance >= 0:
        raise UnweaveError(f"pursuit: expected a tolerance (a residual norm) of 0 or more, found {tolerance}")
    if trail is not None:
        if trail.shape != (len(x), k) or trail.dtype != torch.int32 or not trail.is_contiguous():
            raise UnweaveError(
                f"pursuit: expected a contiguous int32 trail ({len(x)}, {k}), found {trail.dtype} {tuple(trail.shape)}"
            )
        trail.fill_(-1)
    refuse_not_finite("x", x)
    if look_at_atoms:
        refuse_not_finite("the dictionary W", W)


def refuse_not_finite(name: str, rows: Tensor) -> None:
    # A sum is the cheapest look at every number; it may also overflow, so only the second look decides.
    if bool(torch.isfinite(rows.sum())):
        return
    bad = (~torch.isfinite(rows)).any(dim=1).nonzero().squeeze(1)
    if len(bad):
        raise UnweaveError(
            f"pursuit: expected finite numbers, found NaN or infinity in {len(bad)} of {len(rows)} rows of {name} "
            f"(the first is row {int(bad[0])}). Remove those rows, or find out what made them."
        )


def packed(indices: Tensor, values: Tensor, counts: Tensor, n_features: int) -> tuple[Pattern, Tensor]:
    """The first ``counts[i]`` entries of each row of ``indices`` and ``values``, both ``(n, width)``, as a code."""
    n, width = indices.shape
    offsets = torch.zeros(n + 1, dtype=torch.long, device=indices.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    if n * width == int(offsets[-1]):
        return Pattern(offsets, indices.reshape(-1).int(), n_features), values.reshape(-1)
    kept = torch.arange(width, device=indices.device) < counts[:, None]
    return Pattern(offsets, indices[kept].int(), n_features), values[kept]


def nothing(x: Tensor, n_features: int) -> tuple[Pattern, Tensor]:
    """The code without an entry."""
    offsets = torch.zeros(len(x) + 1, dtype=torch.long, device=x.device)
    return Pattern(offsets, torch.zeros(0, dtype=torch.int32, device=x.device), n_features), x.new_zeros(0)
