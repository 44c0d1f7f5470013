"""The pieces under a feature's card: numbers, glyphs, lines, charts, colours."""

from __future__ import annotations

import doctest
import importlib
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from unweave.features.card import charts, formatting, lines
from unweave.features.card.page import static_text


@pytest.mark.parametrize("module", ["formatting", "charts"])
def test_examples_in_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"unweave.features.card.{module}")).failed == 0


def test_numbers_for_people() -> None:
    assert [formatting.number(x) for x in (0.5, 3e-4, 1e-12, 1234.5, math.nan, math.inf, True, "x")] == [
        *("0.5", "3e-4", "1e-12", "1,234", "–", "∞", "true", "x")
    ]
    assert [formatting.percent(x) for x in (0.9996, 0.5, 0.01, 1e-7)] == ["100%", "50.0%", "1.0%", "1e-5%"]
    assert formatting.one_in(0.3) == "1 in 3.3"
    assert formatting.one_in(0) == "never"


def test_what_cannot_be_seen_is_shown() -> None:
    shown = str(formatting.visible("a\tb\x00\u202e<i>\u200b é 👩‍🔬"))
    assert "⇥" in shown
    assert "␀" in shown
    assert "U+202E" in shown  # it would turn the rest of the line around
    assert "\u202e" not in shown
    assert "U+200B" in shown
    assert "&lt;i&gt;" in shown
    assert "👩‍🔬" in shown  # the joiner inside an emoji stays
    assert formatting.plain("\u202e\n") == "U+202E↵"
    assert str(formatting.chip("  a<")) == '<i class="ch">·</i>' * 2 + "a&lt;"
    assert str(formatting.chip(" ")) == '<i class="ch">·</i>'


def context(tokens: list[str], values: list[float], peak: int) -> Any:
    return SimpleNamespace(tokens=tokens, values=values, peak=peak, value=values[peak], document=3, position=40)


def test_a_line_keeps_all_text_in_order_and_shades_by_size() -> None:
    tokens = [f" w{i}" for i in range(60)]
    values = [0.0] * 60
    values[30], values[31], values[2] = 4.0, -1.0, 0.5
    line = lines.lay_out(context(tokens, values, 30), 8.0, near=10)
    parts = [line.far_before, line.before, line.peak, line.after, line.far_after]
    assert "".join(run.text for part in parts for run in part) == "".join(tokens)
    assert [run.text for run in line.peak] == [" w30"]
    assert line.peak[0].css == "tok h5 peak"
    assert line.after[0].css == "tok n2"
    assert line.after[0].tip == "w31  −1.00"
    assert [run.level for run in line.far_before if run.value is not None] == [1]
    assert len(line.before) == 1  # ten silent tokens are one stretch of text


def test_shades_run_from_one_to_ten() -> None:
    assert [lines.shade(v, 10.0) for v in (0, 1e-9, 0.99, 1.01, 9.9, 10, 12, -10)] == [0, 1, 1, 2, 10, 10, 10, 10]
    assert lines.shade(3.0, 0.0) == 10
    assert lines.shade(math.nan, 1.0) == 0


def test_a_peak_inside_a_character_is_shown_on_its_first_token() -> None:
    line = lines.lay_out(context(["in ", "🎉", "", "", " now"], [0.0, 1.0, 3.0, 0.0, 0.0], 2), 3.0)
    assert [(run.text, run.value) for run in line.peak] == [("🎉", 3.0)]
    assert [run.text for run in line.after] == [" now"]


def test_histogram_bars_are_as_tall_as_their_counts() -> None:
    svg = str(charts.histogram([0, 1, 2, 3], [2, 0, 8], name="n", what="tokens"))
    tall = [float(h) for h in re.findall(r'<rect class="bar"[^>]*height="([\d.]+)"', svg)]
    assert tall[1] == pytest.approx(4 * tall[0], rel=0.01)
    assert "2 to 3: 8 tokens" in svg
    assert charts.histogram([0, 1], [0], name="n", what="tokens") == ""


# ---- colours --------------------------------------------------------------------------------------------------


def colours() -> dict[str, tuple[str, str]]:
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", static_text("feature.css"))
    return {name: (light, dark) for name, light, dark in found}


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_has_enough_contrast(theme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for borders of controls and for charts; also on the darkest shade of a token."""
    palette = {name: pair[theme] for name, pair in colours().items()}
    assert len(palette) >= 14
    for text in ("ink", "soft", "accent", "bad"):
        for ground in ("ground", "raised", "sunken"):
            assert contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
    assert contrast(palette["accent-ink"], palette["accent"]) >= 4.5
    for shade in ("heat", "cold"):
        assert contrast(palette["ink"], palette[shade]) >= 4.5, shade
    for mark in ("line-strong", "fill", "heat-edge", "cold-edge"):
        assert contrast(palette[mark], palette["ground"]) >= 3, mark
