"""What every dictionary must do, as checks that anybody can run on theirs.

An author of a method outside this package needs three lines of pytest:

>>> from unweave.testing import parametrize_with_checks            # doctest: +SKIP
>>> @parametrize_with_checks(["my_package.my_module:MyMethod"])    # doctest: +SKIP
... def test_my_method(check): check()

or, without pytest, one call, which raises an error that lists every check that failed:

>>> check_architecture("my_package.my_module:MyMethod")            # doctest: +SKIP

Some checks look at what a dictionary claims of itself by the ClassVars of :class:`~unweave.dictionaries.Dictionary`
(``linear_decoder``, ``ordered_features``, ``homogeneous``, ...); what it does not claim is not asked of it.
"""

from __future__ import annotations

from unweave.testing._case import Case
from unweave.testing._check import CHECKS, Check, ConformanceError
from unweave.testing.run import (
    BoundCheck,
    Report,
    architecture_checks,
    check_architecture,
    parametrize_with_checks,
)

__all__ = [
    "CHECKS",
    "BoundCheck",
    "Case",
    "Check",
    "ConformanceError",
    "Report",
    "architecture_checks",
    "check_architecture",
    "parametrize_with_checks",
]
