"""Every architecture of the package does what every dictionary must."""

from __future__ import annotations

from typing import Any

import unweave.dictionaries as dictionaries
from unweave.testing import parametrize_with_checks

# Where the defaults do not fit 40 features in 12 dimensions.
OPTIONS: dict[str, dict[str, Any]] = {
    "archetypal": {"reservoir": 128, "max_iter": 2, "encode_steps": 30, "n_candidates": 64},  # and to be quick
    "matryoshka": {"group_fractions": (0.1, 0.3, 0.6)},
    "nmf": {"reservoir": 256, "max_iter": 20, "encode_steps": 30},
    "relu": {"l1_coefficient": 0.2},  # the default is for d in the hundreds
    "sklearn_dictionary": {"reservoir": 256, "max_iter": 5},
    "standardised_relu": {"l1_coefficient": 0.2},
    "vsae": {"beta": 0.1},  # the prior of the default leaves little of rows this narrow
}
# Other tests register architectures of their own.
ARCHS = [name for name in dictionaries.names() if dictionaries.get(name).__module__.startswith("unweave.")]


@parametrize_with_checks([(arch, OPTIONS.get(arch, {})) for arch in ARCHS])
def test_architecture(check):
    check()
