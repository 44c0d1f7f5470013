"""What a check is, and the few comparisons that checks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn
from unittest import SkipTest

import torch
from torch import Tensor

from unweave.codes import SparseCode

if TYPE_CHECKING:
    from unweave.dictionaries import Dictionary
    from unweave.testing._case import Case


class ConformanceError(AssertionError):
    """An architecture does not do what every dictionary must: what was expected, and what it did."""


@dataclass(frozen=True)
class Check:
    """One requirement.

    Attributes:
        name: the function's. meaning: its docstring's first line.
        run: raises :class:`ConformanceError`, or SkipTest where it cannot be looked at here.
        applies: whether an architecture is asked for it, by its claims.
    """

    name: str
    meaning: str
    run: Callable[[Case], None]
    applies: Callable[[type[Dictionary]], bool]


CHECKS: dict[str, Check] = {}


def check(applies: Callable[[type[Dictionary]], bool] = lambda kind: True) -> Callable:
    """Make a function ``(case) -> None`` one of the checks."""

    def add(run: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS[run.__name__] = Check(run.__name__, (run.__doc__ or "").strip().split("\n")[0], run, applies)
        return run

    return add


def skip(reason: str) -> NoReturn:
    """Leave a check out, and say why."""
    raise SkipTest(reason)


def require(condition: bool | Tensor, message: str) -> None:
    if not bool(condition):
        raise ConformanceError(message)


def require_finite(tensor: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    require(bad == 0, f"{what}: {bad} of {tensor.numel()} numbers are NaN or infinite")


def require_same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    require(found.shape == expected.shape, f"{what}: expected shape {_shape(expected)}, found {_shape(found)}")
    require(found.dtype == expected.dtype, f"{what}: expected {expected.dtype}, found {found.dtype}")
    if not torch.equal(found, expected):
        raise ConformanceError(f"{what}: expected the same bits, found {_difference(found, expected)}")


def require_close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-7) -> None:
    """Equal up to ``tolerance`` times the largest number expected."""
    require(found.shape == expected.shape, f"{what}: expected shape {_shape(expected)}, found {_shape(found)}")
    found, expected = found.detach().double(), expected.detach().double()
    require_finite(found, what)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    if expected.numel() and float((found - expected).abs().max()) > tolerance * max(scale, 1e-6):
        raise ConformanceError(f"{what}: {_difference(found, expected)}")


def require_same_code(found: SparseCode, expected: SparseCode, what: str) -> None:
    """The same entries with the same bits."""
    require_same_bits(found.offsets, expected.offsets, f"{what} (entries a row)")
    require_same_bits(found.indices, expected.indices, f"{what} (which features)")
    require_same_bits(found.values.detach(), expected.values.detach(), f"{what} (values)")


def require_close_code(found: SparseCode, expected: SparseCode, what: str, tolerance: float = 1e-7) -> None:
    """The same values in every row, up to ``tolerance``; explicit zeros and the order of entries do not matter."""
    require_close(found.detach().dense(), expected.detach().dense(), what, tolerance)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _difference(found: Tensor, expected: Tensor) -> str:
    found, expected = found.detach().double().flatten(), expected.detach().double().flatten()
    different = (found != expected) & ~(found.isnan() & expected.isnan())
    at = int((found - expected).abs().nan_to_num(torch.inf).argmax())
    return (
        f"{int(different.sum())} of {found.numel()} numbers differ, most at number {at}: expected "
        f"{float(expected[at]):.6g}, found {float(found[at]):.6g}"
    )
