"""What to put in the place of activation rows: functions from ``(n, d)`` rows to ``(n, d)`` rows, for ``splice``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary
from unweave.errors import UnweaveError

RowEdit = Callable[[Tensor], Tensor]
CodeEdit = Callable[[SparseCode], SparseCode]


def ablate_zero(rows: Tensor) -> Tensor:
    """Rows of zeros."""
    return torch.zeros_like(rows)


def ablate_mean(mean: Tensor) -> RowEdit:
    """Every row becomes ``mean``, shape ``(d,)``."""

    def edit(rows: Tensor) -> Tensor:
        if mean.shape != rows.shape[1:]:
            raise UnweaveError(
                f"ablate_mean: expected a mean of shape {tuple(rows.shape[1:])}, found {tuple(mean.shape)}"
            )
        return mean.to(rows).expand_as(rows)

    return edit


def reconstruct(dictionary: Dictionary, edit: CodeEdit | None = None, keep_error: bool = False) -> RowEdit:
    """Rows become what the dictionary makes of them.

    Args:
        dictionary: gives the codes and decodes them.
        edit: changes the codes before they are decoded.
        keep_error: False gives ``decode(edit(z))``, and what an architecture lets pass its code by. True adds back
            what the dictionary could not explain, ``x + (decode(edit(z)) - decode(z))``: only the edit shows, and an
            edit that changes nothing leaves the row exactly as it was. Needs a dictionary whose output is its input
            (``d_out == d_in``).

    Raises:
        UnweaveError: (when used) for rows of the wrong width or with NaN.
    """
    if keep_error and dictionary.d_in != dictionary.d_out:
        raise UnweaveError(
            f"reconstruct: the error term needs d_out == d_in, found d_in {dictionary.d_in} and d_out "
            f"{dictionary.d_out}: the error of a transcoder belongs to its target, not to its input"
        )

    return Reconstruct(dictionary, edit, keep_error)


@dataclass(frozen=True)
class Reconstruct:
    """What :func:`reconstruct` returns; ``splice`` asks it which dictionary it is of."""

    dictionary: Dictionary
    edit: CodeEdit | None
    keep_error: bool

    def __call__(self, rows: Tensor) -> Tensor:
        dictionary = self.dictionary
        x = dictionary.check_input(rows)
        code = dictionary.encode(x)
        edited = code if self.edit is None else self.edit(code)
        decoded = dictionary.reconstruct(x, edited)
        if not self.keep_error:
            return decoded
        change = decoded - dictionary.reconstruct(x, code)
        # Added in the wider of the two dtypes and rounded once, so that no change means not one bit of change.
        return (rows.to(torch.promote_types(rows.dtype, change.dtype)) + change.to(rows.device)).to(rows.dtype)
