"""Matching pursuit and its orthogonal sibling on a CPU, in float32.

Written out, pursuit is one full product of residuals and atoms for every pick. But a residual is the row less some
atoms, so its correlations are those of the row less rows of the Gram matrix ``G = W W^T``: after one product, a pick
costs one pass over the row's correlations, which also finds the next pick. (For orthogonal pursuit this is Batch-OMP,
Rubinstein, Zibulevsky and Elad 2008.) Where G does not fit, ``method`` has other ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.kernels._jit import array, run
from unweave.kernels.pattern import Pattern, concatenate
from unweave.kernels.pursuit import Screening, check, nonnegative, nothing, packed, reference, refuse_not_finite
from unweave.kernels.pursuit._matching import pursue
from unweave.kernels.pursuit._nonnegative import pursue_nonnegatively
from unweave.kernels.pursuit._orthogonal import pursue_orthogonally
from unweave.kernels.pursuit._screened import Progress, pursue_screened
from unweave.kernels.select.cpu import topk

Method = Literal["gram", "residual", "screened"]
_ROOM = 2**23  # correlations worked out at a time (32 MB)
_MOST_GRAM_BYTES = 2**32  # of a Gram matrix made without being asked for: 32,768 atoms


def gram_matrix(W: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """``W W^T (m, m)`` of atoms ``W (m, d)``, to encode many batches with.

    Args:
        dtype: float32, or bfloat16 for half the memory and traffic. With a bfloat16 Gram matrix correlations are off
            by up to 0.4% of what was taken off, so where two atoms are close another one may be picked.
    """
    _check_gram_dtype(dtype)
    refuse_not_finite("the dictionary W", W)
    m, W = len(W), W.detach()
    # numpy asks for huge pages, and torch does not: rows of G are read in no order, each from pages of its own.
    made = torch.from_numpy(np.empty((m, m), np.float32 if dtype == torch.float32 else np.int16))
    G = made if dtype == torch.float32 else made.view(torch.bfloat16)
    step = max(256, _ROOM // max(1, m))
    for lo in range(0, m, step):
        if dtype == torch.float32:
            torch.mm(W[lo : lo + step], W.T, out=G[lo : lo + step])
        else:
            G[lo : lo + step] = W[lo : lo + step] @ W.T
    return G


def matching_pursuit(
    x: Tensor,
    W: Tensor,
    k: int,
    *,
    signed: bool = False,
    distinct: bool = False,
    until_repeat: bool = False,
    tolerance: float | None = None,
    trail: Tensor | None = None,
    method: Method | None = None,
    gram: Tensor | None = None,
    screening: Screening | None = None,
) -> tuple[Pattern, Tensor]:
    """As :func:`unweave.kernels.pursuit.reference.matching_pursuit`, in float32.

    Args:
        x: ``(n, d)`` rows. W: ``(m, d)`` atoms of norm 1. k, signed, distinct, until_repeat, tolerance, trail: as
            there; "screened" knows neither ``until_repeat`` nor ``trail``.
        method: "gram" updates correlations by rows of the Gram matrix: one product of x and W, and a pass over ``m``
            numbers a pick. "residual" is the reference: a product a pick. Both are exact, and None takes what is
            faster: "gram" if there is one, or if it takes no more than 4 GiB (32,768 atoms) and the batch makes up for
            working it out. "screened" is an APPROXIMATION for dictionaries whose Gram matrix does not fit: it picks
            among each row's best candidates for as long as no other atom is likely to have overtaken them, then
            multiplies by all atoms again.
        gram: ``(m, m)`` from :func:`gram_matrix`, float32 or bfloat16; worked out in float32 if None.
        screening: how many candidates "screened" takes and how careful it is; told what it did.

    Returns:
        The pattern, entries in order of first pick, and their values ``(nnz,)``.

    Raises:
        UnweaveError: when shapes or types do not fit, or a number is not finite.
    """
    options = _Options(k, signed, tolerance, distinct, orthogonal=False, until_repeat=until_repeat, trail=trail)
    return _encode(x, W, options, method, gram, screening or Screening())


def orthogonal_matching_pursuit(
    x: Tensor,
    W: Tensor,
    k: int,
    *,
    signed: bool = False,
    tolerance: float | None = None,
    method: Method | None = None,
    gram: Tensor | None = None,
    screening: Screening | None = None,
) -> tuple[Pattern, Tensor]:
    """As :func:`unweave.kernels.pursuit.reference.orthogonal_matching_pursuit`, in float32; arguments as above.

    By the Gram matrix and a Cholesky factor that grows with the picks, the t-th of which costs t passes over the
    row's correlations.
    """
    options = _Options(k, signed, tolerance, distinct=True, orthogonal=True)
    return _encode(x, W, options, method, gram, screening or Screening())


@torch.no_grad()
def nonnegative_pursuit(x: Tensor, W: Tensor, k: int, *, tolerance: float | None = None) -> tuple[Pattern, Tensor]:
    """As :func:`unweave.kernels.pursuit.nonnegative.nonnegative_pursuit`, in float32, by the Gram matrix if it fits."""
    x, W = x.detach().contiguous(), W.detach().contiguous()
    check(x, W, k, tolerance)
    n, m, width = len(x), len(W), min(k, len(W), x.shape[1])
    if n * width == 0:
        return nothing(x, m)
    if not _gram_pays(n, m, k):
        return nonnegative.nonnegative_pursuit(x, W, k, tolerance=tolerance)
    results = torch.zeros(n, width, dtype=torch.int32), torch.zeros(n, width), torch.zeros(n, dtype=torch.long)
    G, step = array(gram_matrix(W)), min(n, max(64, _ROOM // m))
    room, least = _room(step, m), np.float32(-1 if tolerance is None else tolerance)
    for lo in range(0, n, step):
        part = x[lo : lo + step]
        C = torch.mm(part, W.T, out=room[: len(part)])
        out = [array(result[lo : lo + step]) for result in results]
        run(pursue_nonnegatively, len(part), array(part), array(W), array(C), G, k, least, *out, work=k * k * m / 2)
    return packed(*results, m)


# ---- how it is done -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    k: int
    signed: bool
    tolerance: float | None
    distinct: bool
    orthogonal: bool
    until_repeat: bool = False
    trail: Tensor | None = None

    @property
    def least_residual(self) -> np.float32:
        """The tolerance as the compiled loops take it: below zero if there is none."""
        return np.float32(-1 if self.tolerance is None else self.tolerance)


_Results = tuple[Tensor, Tensor, Tensor]  # indices and values (n, width), counts (n,)


def _encode(
    x: Tensor, W: Tensor, options: _Options, method: Method | None, gram: Tensor | None, screening: Screening
) -> tuple[Pattern, Tensor]:
    x, W = x.detach().contiguous(), W.detach().contiguous()
    n, m = len(x), len(W)
    check(x, W, options.k, options.tolerance, options.trail, look_at_atoms=gram is None)  # else gram_matrix has
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise UnweaveError(
            f"the compiled pursuit takes float32 on the CPU, found {x.dtype} on {x.device}: "
            "use unweave.kernels.pursuit.reference"
        )
    if gram is not None:
        _check_gram_dtype(gram.dtype)
        if gram.shape != (m, m):
            raise UnweaveError(f"pursuit: expected a Gram matrix ({m}, {m}), found {tuple(gram.shape)}")
    if method is None:
        method = "gram" if gram is not None or _gram_pays(n, m, options.k) else "residual"
    elif method not in ("gram", "residual", "screened"):
        raise UnweaveError(f"pursuit: expected method 'gram', 'residual', 'screened' or None, found {method!r}")
    if method == "screened" and (options.until_repeat or options.trail is not None):
        raise UnweaveError("pursuit: method 'screened' knows neither until_repeat nor trail: use 'gram' or 'residual'")
    width = min(options.k, m)
    if n * width == 0:
        return nothing(x, m)
    if method == "residual":
        return _by_residuals(x, W, options)
    results = torch.zeros(n, width, dtype=torch.int32), torch.zeros(n, width), torch.zeros(n, dtype=torch.long)
    if method == "screened":
        _by_candidates(x, W, options, screening, results)
    else:
        _by_gram(x, W, gram_matrix(W) if gram is None else gram.contiguous(), options, results)
    return packed(*results, m)


def _by_residuals(x: Tensor, W: Tensor, options: _Options) -> tuple[Pattern, Tensor]:
    asked: dict[str, Any] = {"signed": options.signed, "tolerance": options.tolerance}
    step = max(64, _ROOM // max(len(W), options.k * x.shape[1]))
    rows = range(0, len(x), step)
    if options.orthogonal:
        parts = [reference.orthogonal_matching_pursuit(x[i : i + step], W, options.k, **asked) for i in rows]
    else:
        asked |= {"distinct": options.distinct, "until_repeat": options.until_repeat}
        trails = [None if options.trail is None else options.trail[i : i + step] for i in rows]
        parts = [
            reference.matching_pursuit(x[i : i + step], W, options.k, trail=trail, **asked)
            for i, trail in zip(rows, trails)
        ]
    return concatenate([pattern for pattern, _ in parts]), torch.cat([values for _, values in parts])


def _by_gram(x: Tensor, W: Tensor, G: Tensor, options: _Options, results: _Results) -> None:
    n, m = len(x), len(W)
    step = min(n, max(64, _ROOM // m))
    room, work = _room(step, m), options.k * m / 4  # simple passes
    trail = torch.empty(n, 0, dtype=torch.int32) if options.trail is None else options.trail
    for lo in range(0, n, step):
        part = x[lo : lo + step]
        C = torch.mm(part, W.T, out=room[: len(part)])
        read = array(part), array(W), array(C), array(G)
        out = [array(result[lo : lo + step]) for result in results]
        if options.orthogonal:
            how = G.dtype == torch.bfloat16, options.signed, options.least_residual
            run(pursue_orthogonally, len(C), *read, *how, *out, work=work)
        else:
            how = options.k, options.signed, options.distinct, options.until_repeat, options.least_residual
            run(pursue, len(C), *read, *how, *out, array(trail[lo : lo + step]), work=work)


def _by_candidates(x: Tensor, W: Tensor, options: _Options, screening: Screening, results: _Results) -> None:
    n, m, width = len(x), len(W), results[0].shape[1]
    wanted, caution = screening.n_candidates, screening.caution
    n_candidates = min(m, max(1, 8 * options.k + 64 if wanted is None else wanted))
    caution = min(1.0, max(0.2, 5 / math.sqrt(x.shape[1]))) if caution is None else caution
    how = options.k, options.signed, options.distinct, options.orthogonal, options.least_residual, np.float32(caution)
    step = min(n, max(64, _ROOM // max(m, width * width if options.orthogonal else 1)))
    room, zeros, work = _room(step, m), torch.zeros(m), options.k * 2 * n_candidates
    for lo in range(0, n, step):
        part = x[lo : lo + step]
        indices, values, counts = (result[lo : lo + step] for result in results)
        residual, picks, proven = part.clone(), torch.zeros_like(counts), torch.zeros_like(counts)
        done = torch.zeros(len(part), dtype=torch.bool)
        progress = Progress(
            residual=array(residual),
            indices=array(indices),
            values=array(values),
            counts=array(counts),
            picks=array(picks),
            proven=array(proven),
            done=array(done),
            factors=np.zeros((len(part), width if options.orthogonal else 0, width)),
            projections=np.zeros((len(part), width)),
        )
        active = torch.arange(len(part))
        while len(active):
            C = torch.mm(residual[active], W.T, out=room[: len(active)])
            if options.distinct:
                entry = torch.arange(width) < counts[active, None]
                C[entry.nonzero()[:, 0], indices[active][entry].long()] = 0
            pattern, scores = topk(C, zeros, n_candidates, signed=options.signed)
            near = [array(found.view(len(C), n_candidates)) for found in (scores, pattern.indices)]
            read = array(active), array(part), array(W)
            run(pursue_screened, len(active), *read, *near, *how, progress, work=work)
            screening.n_products += len(active)
            active = (~done).nonzero().squeeze(1)
        screening.n_picks += int(picks.sum())
        screening.n_proven += int(proven.sum())


def _gram_pays(n: int, m: int, k: int) -> bool:
    """Whether a Gram matrix fits, and the batch makes up for working it out."""
    return 4 * m * m <= _MOST_GRAM_BYTES and m <= n * k


def _room(n: int, m: int) -> Tensor:
    """Memory for correlations, used again: fresh memory costs a page fault for every 4 kB, or 2 MB as numpy asks."""
    return torch.from_numpy(np.empty((n, m), np.float32))


def _check_gram_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise UnweaveError(f"pursuit: expected a Gram matrix in float32 or bfloat16, found {dtype}")
