"""How the atoms of a dictionary lie to each other, and what that says of its codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary
from unweave.errors import UnweaveError

_ROOM = 2**24  # inner products worked out at a time


def coherence(atoms: Tensor) -> float:
    """The largest absolute cosine between two of ``(m, d)`` atoms; 0 for fewer than two."""
    return babel(atoms, 1)


def babel(atoms: Tensor, k: int) -> float:
    """``mu_1(k)``: the largest sum of absolute cosines between one of ``(m, d)`` atoms and ``k`` others (Tropp 2004).

    0 for orthogonal atoms, k for copies of one; k = 1 is the coherence. Below 1 for k - 1 and k together,
    ``mu_1(k - 1) + mu_1(k) < 1``, pursuit recovers every code of k atoms.

    Raises:
        UnweaveError: for k below 1.
    """
    if k < 1:
        raise UnweaveError(f"babel: expected k of 1 or more, found {k}")
    most = 0.0
    for block in _absolute_cosines(atoms):
        most = max(most, float(block.topk(min(k, len(atoms)), dim=1).values.sum(1).max()))
    return most


def babel_of_codes(atoms: Tensor, code: SparseCode) -> Tensor:
    """``(n,)`` the same among the atoms that fire together in a row, one against all others; 0 for fewer than two."""
    unit, code = F.normalize(atoms, dim=1), code.nonzero()
    out = unit.new_zeros(len(code))
    for row, (start, end) in enumerate(zip(code.offsets[:-1].tolist(), code.offsets[1:].tolist())):
        if end - start > 1:
            together = unit[code.indices[start:end].long()]
            out[row] = (together @ together.T).abs().fill_diagonal_(0).sum(1).max()
    return out


def _absolute_cosines(atoms: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of ``|cos|`` between all atoms, zero on the diagonal. Atoms of norm zero have cosine zero."""
    unit = F.normalize(atoms.detach(), dim=1)
    step = max(1, _ROOM // max(1, len(unit)))
    for lo in range(0, len(unit), step):
        block = (unit[lo : lo + step] @ unit.T).abs()
        here = torch.arange(len(block), device=block.device)
        block[here, lo + here] = 0
        yield block


def effective_rank(code: SparseCode) -> float:
    """How many directions the firing together of features has: ``exp(entropy of the normalised singular values)``.

    The singular values are those of the co-activation matrix ``B^T B``, B the ``(n, n_features)`` matrix of which
    feature fires where. One group of features that always fire together counts once. nan where nothing fires.
    (The definition is our reading of MP-SAE's measure.) Dense in the smaller of rows and features that fire: sample
    some thousand rows.
    """
    code = code.nonzero()
    live, indices = code.indices.long().unique(return_inverse=True)
    if len(live) == 0:
        return float("nan")
    B = torch.zeros(len(code), len(live), dtype=torch.float64, device=code.device)
    B[code.rows, indices] = 1
    values = torch.linalg.eigvalsh(B @ B.T if len(B) < len(live) else B.T @ B).clamp_min(0)
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def energy_share(code: SparseCode, rows: Tensor) -> Tensor:
    """``(n_features,)`` the share of each feature's energy that comes from the marked rows; nan where it is silent.

    Energy is the mean square over the rows of a kind, so that kinds of different size weigh the same. With the rows of
    images marked among those of images and texts this is a modality score: near 0 or 1 where a feature belongs to one
    of them, in between where it is shared. (Our reading of MP-SAE's measure.)

    Args:
        rows: ``(n,)`` boolean.

    Raises:
        UnweaveError: when rows and codes differ in number, or one kind has none.
    """
    if rows.shape != (len(code),) or rows.dtype != torch.bool:
        raise UnweaveError(f"expected a boolean for each of {len(code)} rows, found {rows.dtype} {tuple(rows.shape)}")
    n_marked = int(rows.sum())
    if n_marked in (0, len(code)):
        raise UnweaveError(f"expected rows of both kinds, found {n_marked} of {len(code)} marked")
    marked, squares = rows[code.rows], code.values.detach().double().square()
    energy = squares.new_zeros(2, code.n_features)
    energy[0].index_add_(0, code.indices[marked].long(), squares[marked] / n_marked)
    energy[1].index_add_(0, code.indices[~marked].long(), squares[~marked] / (len(code) - n_marked))
    return energy[0] / energy.sum(0)


def epsilon_bound(norms: Tensor, code_norms: Tensor, n_atoms: int) -> Tensor:
    """``eps_LBO = | ||x||^2 - ||f||^2 | / ((h - 1) ||f||^2)``: the least coherence that can explain each row.

    For a row ``x = f W`` of h unit atoms with inner products of at most eps in magnitude,
    ``| ||x||^2 - ||f||^2 | = | sum over i != j of f_i f_j <w_i, w_j> | <= eps (h - 1) ||f||^2``, whatever the signs.
    Infinite where the code is empty and the row is not (Lee et al. 2025).

    Args:
        norms: ``(n,)`` of the rows. code_norms: ``(n,)`` of their codes. n_atoms: h.
    """
    gap, squares = (norms.square() - code_norms.square()).abs(), code_norms.square()
    return torch.where(gap == 0, 0.0, gap / (max(1, n_atoms - 1) * squares))


def norm_fan(c: float) -> tuple[float, float]:
    """Between which ratios ``||f|| / ||x||`` lies where ``eps (h - 1) = c``: the fan lines of the ZF plot."""
    if c < 0:
        raise UnweaveError(f"norm_fan: expected c of 0 or more, found {c}")
    return (1 / (1 + c)) ** 0.5, (1 / (1 - c)) ** 0.5 if c < 1 else float("inf")


@dataclass(frozen=True)
class ZF:
    """Norms of rows beside norms of their codes: the points of a ZF plot.

    Attributes:
        z: ``(n,)`` norms of the rows. f: ``(n,)`` norms of their codes, the decoder's bias counted as one more feature.
        epsilon: ``(n,)``, :func:`epsilon_bound` of each row.
    """

    z: Tensor
    f: Tensor
    epsilon: Tensor

    @property
    def ratio(self) -> float:
        """The median of f / z: 1 where atoms are orthogonal and codes exact, below 1 where codes are too short."""
        return float((self.f / self.z).median())

    def __repr__(self) -> str:
        median = float(self.epsilon.median()) if len(self.epsilon) else float("nan")
        return f"ZF({len(self.z):,} rows, median f/z {self.ratio:.3g}, median eps_LBO {median:.2g})"


@torch.no_grad()
def zf(dictionary: Dictionary, rows: Tensor, target: Tensor | None = None) -> ZF:
    """The ZF diagnostic of quasi-orthogonality (Lee et al. 2025) for any dictionary with a linear decoder.

    Each feature counts ``value ||atom||``, and what the decoder makes of an empty code, its bias, counts as a feature
    that fires everywhere. Codes are those of eval mode.

    Args:
        rows: ``(n, d_in)``. target: ``(n, d_out)`` what they are decoded to, if not themselves.

    Raises:
        UnweaveError: for a decoder that is not linear: it has no atoms that a code could be as long as.
    """
    if not dictionary.linear_decoder:
        raise UnweaveError(f"zf: {dictionary.name} does not decode linearly, so no norm of its codes is to be expected")
    was_training = dictionary.training
    try:
        code = dictionary.eval().encode(rows)
    finally:
        dictionary.train(was_training)
    lengths = code.values * dictionary.decoder_directions().norm(dim=1)[code.indices.long()]
    squares = lengths.new_zeros(len(code)).index_add_(0, code.rows, lengths.square())
    empty = SparseCode.empty(1, dictionary.n_features, dtype=lengths.dtype).to(lengths.device)
    bias = dictionary.decode(empty).norm()
    f, z = (squares + bias.square()).sqrt(), (rows if target is None else target).to(lengths).norm(dim=1)
    return ZF(z, f, epsilon_bound(z, f, dictionary.n_features + int(bias > 0)))
