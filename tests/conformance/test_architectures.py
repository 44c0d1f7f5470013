"""Every architecture of the package does what every dictionary must."""

from __future__ import annotations

from typing import Any

import unweave.dictionaries as dictionaries
from unweave.testing import parametrize_with_checks

# Where the defaults do not fit 40 features in 12 dimensions.
OPTIONS: dict[str, dict[str, Any]] = {
    "matryoshka": {"group_fractions": (0.1, 0.3, 0.6)},
    "relu": {"l1_coefficient": 0.2},  # the default is for d in the hundreds
}
# Other tests register architectures of their own.
ARCHS = [name for name in dictionaries.names() if dictionaries.get(name).__module__.startswith("unweave.")]


@parametrize_with_checks([(arch, OPTIONS.get(arch, {})) for arch in ARCHS])
def test_architecture(check):
    check()
