"""The plans a user can ask for, by name. Apart from what they stand for, so that a config needs no torch to be read."""

from __future__ import annotations

from typing import Literal, get_args

Pin = Literal[
    "reference",
    "cpu",
    "cpu+torch",
    "cpu+numpy",
    "cpu+onednn",
    "cpu+certified",
    "cpu+screen",
    "cpu+int8_screen",
    "cpu+bfloat16",
    "gpu",
    "gpu+screen",
    "gpu+bfloat16",
]
PINS: tuple[Pin, ...] = get_args(Pin)
