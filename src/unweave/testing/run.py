"""Running the checks: one by one under pytest, or all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError, near_names

# Imported for the checks that they register.
from unweave.testing import _decoding as _decoding
from unweave.testing import _encoding as _encoding
from unweave.testing import _facts as _facts
from unweave.testing import _files as _files
from unweave.testing import _inputs as _inputs
from unweave.testing import _learning as _learning
from unweave.testing import _moves as _moves
from unweave.testing import _symmetry as _symmetry
from unweave.testing._case import Case, seeded
from unweave.testing._check import CHECKS, Check, ConformanceError

Arch = str | type[Dictionary]


@dataclass(frozen=True)
class BoundCheck:
    """A check of one architecture: call it. Its ``str`` is a name for a test report."""

    check: Check
    case: Case

    def __call__(self) -> None:
        """
        Raises:
            ConformanceError: when the architecture fails.
            unittest.SkipTest: where this cannot be checked here; pytest shows it as skipped.
        """
        where = f"{self.case.kind.name}, {self.check.name}"
        try:
            with seeded(0):
                self.check.run(self.case)
        except ConformanceError as error:
            raise ConformanceError(f"{where} ({self.check.meaning}) {error}") from None
        except (SkipTest, KeyboardInterrupt):
            raise
        except Exception as error:
            raise ConformanceError(
                f"{where} ({self.check.meaning}) stopped with {type(error).__name__}: {error}"
            ) from error

    def __str__(self) -> str:
        return f"{self.case.kind.name}-{self.check.name}"


@dataclass(frozen=True)
class Report:
    """What became of each check.

    Attributes:
        passed: names. failed, skipped: name to message.
    """

    arch: str
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.arch}: {len(self.passed)} checks passed, {len(self.failed)} failed"]
        lines += [f"  failed {message}" for message in self.failed.values()]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def architecture_checks(
    arch: Arch | Case,
    options: dict[str, Any] | None = None,
    *,
    only: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
) -> list[BoundCheck]:
    """The checks that an architecture is asked for, each ready to be called.

    Args:
        arch: a class, a registered name, ``package.module:Class``, or a :class:`Case`.
        options: of its config, where the defaults do not fit 40 features in 12 dimensions.
        only, leave_out: names of checks (see :data:`CHECKS`).

    Raises:
        UnweaveError: for an unknown architecture or check.
    """
    for name in [*(only or ()), *leave_out]:
        if name not in CHECKS:
            raise UnweaveError(f"no check {name!r}: {near_names(name, CHECKS)}")
    case = arch if isinstance(arch, Case) else Case(arch, options)
    wanted = [CHECKS[name] for name in (CHECKS if only is None else only) if name not in leave_out]
    return [BoundCheck(check, case) for check in wanted if check.applies(case.kind)]


def check_architecture(
    arch: Arch | Case,
    options: dict[str, Any] | None = None,
    *,
    only: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
) -> Report:
    """Run every check on an architecture; arguments as for :func:`architecture_checks`.

    Returns:
        The report, when none failed.

    Raises:
        ConformanceError: with the report, when some did.
    """
    checks = architecture_checks(arch, options, only=only, leave_out=leave_out)
    report = Report(checks[0].case.kind.name if checks else str(arch))
    for bound in checks:
        try:
            bound()
        except ConformanceError as error:
            report.failed[bound.check.name] = str(error)
        except SkipTest as reason:
            report.skipped[bound.check.name] = str(reason)
        else:
            report.passed.append(bound.check.name)
    if report.failed:
        raise ConformanceError(str(report))
    return report


def parametrize_with_checks(archs: Iterable[Arch | tuple[Arch, dict[str, Any]] | Case]) -> Callable[[Any], Any]:
    """Pytest decorator: run a test ``(check)`` once for every check of every architecture.

    Args:
        archs: architectures, each alone, with its options as ``(arch, options)``, or as a :class:`Case`.
    """
    import pytest

    checks = [
        bound
        for entry in archs
        for bound in (architecture_checks(*entry) if isinstance(entry, tuple) else architecture_checks(entry))
    ]
    return pytest.mark.parametrize("check", checks, ids=str)
