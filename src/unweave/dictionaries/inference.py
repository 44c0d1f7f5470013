"""Codes worked out at inference from the decoder alone: what a dictionary could say, whatever its encoder does say."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary
from unweave.errors import UnweaveError
from unweave.kernels.backend import serves
from unweave.kernels.pattern import Pattern
from unweave.kernels.pursuit import reference

_CHUNK = 2048  # rows at a time, each with the correlations of all features

Method = Literal["gradient", "matching", "orthogonal"]


@torch.no_grad()
def pursue(
    dictionary: Dictionary,
    rows: Tensor,
    k: int | Tensor | None = None,
    *,
    method: Method = "gradient",
    signed: bool = False,
) -> SparseCode:
    """The code of rows by pursuit over a dictionary's atoms, in place of its encoder (inference-time optimisation).

    How much of an error is the encoder's and how much the decoder's: the atoms are the same, only the search for them
    is better, and slower (a product with all features for each pick).

    Args:
        rows: ``(n, d_out)`` in raw units, what is to be reconstructed.
        k: picks a row: a number, or ``(n,)`` of them. None: as many as the dictionary's own code of the row has (for
            dictionaries whose input is their target).
        method: "gradient" (Smith 2024, Replacing SAE encoders with inference-time optimisation), the default because
            it comes near "orthogonal" without solving for all values after each pick; or "matching".
        signed: allow negative values. Without it those of "gradient" and "matching" are positive; those of
            "orthogonal" may be of either sign all the same.

    Returns:
        A code for ``dictionary.decode``, with at most k entries a row and no zeros among them.

    Raises:
        UnweaveError: for a decoder that is not linear or not all of the output (standardised rows, a skip), rows of
            another width or with NaN, or budgets that do not fit.
    """
    if not dictionary.linear_decoder:
        raise UnweaveError(f"{dictionary.name}: its decoder is not linear, and pursuit adds up atoms")
    if type(dictionary).reconstruct is not Dictionary.reconstruct:
        raise UnweaveError(
            f"{dictionary.name}: what it puts out depends on its input beside the code, and pursuit knows only "
            "the rows to be reconstructed"
        )
    if rows.ndim != 2 or rows.shape[1] != dictionary.d_out:
        raise UnweaveError(
            f"{dictionary.name}: expected rows of shape (n, {dictionary.d_out}), found {tuple(rows.shape)}"
        )
    if method not in ("gradient", "matching", "orthogonal"):
        raise UnweaveError(f"pursue: expected method 'gradient', 'matching' or 'orthogonal', found {method!r}")
    atoms = dictionary.decoder_directions()
    rows = rows.to(atoms.device, atoms.dtype)
    if k is None:
        k = dictionary.encode(rows).l0()
    budgets = torch.as_tensor(k, device=rows.device).expand(len(rows))
    nothing = SparseCode.empty(1, dictionary.n_features, atoms.dtype).to(rows.device)
    wanted, norms = rows - dictionary.decode(nothing), atoms.norm(dim=1)
    atoms = F.normalize(atoms, dim=1)
    parts, places = [], []
    for budget in budgets.unique().tolist():
        for place in (budgets == budget).nonzero().squeeze(1).split(_CHUNK):
            parts.append(_pursued(wanted[place], atoms, budget, method, signed))
            places.append(place)
    if not parts:
        return SparseCode.empty(0, dictionary.n_features, atoms.dtype).to(rows.device)
    code = SparseCode.concatenate(parts)[torch.cat(places).argsort()].nonzero()
    return SparseCode.from_pattern(code.pattern, code.values / norms[code.indices.long()])


def _pursued(x: Tensor, atoms: Tensor, k: int, method: Method, signed: bool) -> SparseCode:
    found: tuple[Pattern, Tensor]
    if method == "gradient":
        found = reference.gradient_pursuit(x, atoms, k, signed=signed)
    else:
        name = "matching_pursuit" if method == "matching" else "orthogonal_matching_pursuit"
        module = reference
        if serves("cpu", x):
            from unweave.kernels.pursuit import cpu as module
        found = getattr(module, name)(x.contiguous(), atoms, k, signed=signed)
    return SparseCode.from_pattern(*found)
