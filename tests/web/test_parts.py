"""The pieces under the pages: numbers, glyphs, lines, charts, colours."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from unweave.web import _charts, _format, _lines, _overview
from unweave.web._data import clean
from unweave.web._render import static_text


@pytest.mark.parametrize("module", ["_format", "_charts", "_security", "_encoder"])
def test_examples_in_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"unweave.web.{module}")).failed == 0


def test_numbers_for_people() -> None:
    assert [_format.number(x) for x in (0.5, 3e-4, 1e-12, 1234.5, math.nan, math.inf, True, "x")] == [
        *("0.5", "3e-4", "1e-12", "1,234", "–", "∞", "true", "x")
    ]
    assert [_format.percent(x) for x in (0.9996, 0.5, 0.01, 1e-7)] == ["100%", "50.0%", "1.0%", "1e-5%"]
    assert _format.one_in(0.3) == "1 in 3.3"
    assert _format.one_in(0) == "never"


def test_what_cannot_be_seen_is_shown() -> None:
    shown = str(_format.visible("a\tb\x00\u202e<i>\u200b é 👩‍🔬"))
    assert "⇥" in shown
    assert "␀" in shown
    assert "U+202E" in shown  # it would turn the rest of the line around
    assert "\u202e" not in shown
    assert "U+200B" in shown
    assert "&lt;i&gt;" in shown
    assert "👩‍🔬" in shown  # the joiner inside an emoji stays
    assert _format.plain("\u202e\n") == "U+202E↵"
    assert str(_format.chip("  a<")) == '<i class="ch">·</i>' * 2 + "a&lt;"
    assert str(_format.chip(" ")) == '<i class="ch">·</i>'


def context(tokens: list[str], values: list[float], peak: int) -> Any:
    return SimpleNamespace(tokens=tokens, values=values, peak=peak, value=values[peak], document=3, position=40)


def test_a_line_keeps_all_text_in_order_and_shades_by_size() -> None:
    tokens = [f" w{i}" for i in range(60)]
    values = [0.0] * 60
    values[30], values[31], values[2] = 4.0, -1.0, 0.5
    line = _lines.lay_out(context(tokens, values, 30), 8.0, near=10)
    parts = [line.far_before, line.before, line.peak, line.after, line.far_after]
    assert "".join(run.text for part in parts for run in part) == "".join(tokens)
    assert [run.text for run in line.peak] == [" w30"]
    assert line.peak[0].css == "tok h5 peak"
    assert line.after[0].css == "tok n2"
    assert line.after[0].tip == "w31  −1.00"
    assert [run.level for run in line.far_before if run.value is not None] == [1]
    assert len(line.before) == 1  # ten silent tokens are one stretch of text


def test_shades_run_from_one_to_ten() -> None:
    assert [_lines.shade(v, 10.0) for v in (0, 1e-9, 0.99, 1.01, 9.9, 10, 12, -10)] == [0, 1, 1, 2, 10, 10, 10, 10]
    assert _lines.shade(3.0, 0.0) == 10
    assert _lines.shade(math.nan, 1.0) == 0


def test_a_peak_inside_a_character_is_shown_on_its_first_token() -> None:
    line = _lines.lay_out(context(["in ", "🎉", "", "", " now"], [0.0, 1.0, 3.0, 0.0, 0.0], 2), 3.0)
    assert [(run.text, run.value) for run in line.peak] == [("🎉", 3.0)]
    assert [run.text for run in line.after] == [" now"]


def test_charts_are_drawn_from_finite_points_and_escaped() -> None:
    points = [(1.0, 5.0), (2.0, math.nan), (3.0, 0.001), (4.0, math.inf), (5.0, 2.0)]
    svg = str(_charts.line_chart(points, name='a "b" <c>'))
    data = json.loads(re.search(r'data-points="([^"]+)"', svg)[1].replace("&#34;", '"'))  # type: ignore[index]
    assert len(data) == 3
    assert "<c>" not in svg
    assert "NaN" not in svg
    assert "nan" not in svg
    assert _charts.line_chart(points[:1], name="x") == ""
    assert _charts.line_chart([(1.0, 2.0), (2.0, 2.0)], name="flat") != ""
    many = _charts.line_chart([(float(i), math.sin(i)) for i in range(5000)], name="long")
    assert len(many) < 20_000


def test_histogram_bars_are_as_tall_as_their_counts() -> None:
    svg = str(_charts.histogram([0, 1, 2, 3], [2, 0, 8], name="n", what="tokens"))
    tall = [float(h) for h in re.findall(r'<rect class="bar"[^>]*height="([\d.]+)"', svg)]
    assert tall[1] == pytest.approx(4 * tall[0], rel=0.01)
    assert "2 to 3: 8 tokens" in svg
    assert _charts.histogram([0, 1], [0], name="n", what="tokens") == ""


def test_results_keep_order_intervals_and_unknown_measures() -> None:
    table = _overview.results(
        {
            "metrics": {
                "my_score": {"value": 0.25},
                "l0": {"value": 32, "low": 31, "high": 33},
                "fvu": {"value": None},
            },
            "baselines": {"pca": {"l0": {"value": 40}}},
        }
    )
    assert table is not None
    assert [row.key for row in table.rows] == ["fvu", "l0", "my_score"]
    assert table.rows[1].cell.interval == "31 to 33"
    assert table.rows[1].rivals[0].text == "40"
    assert table.rows[0].cell.text == "–"
    assert _overview.results(None) is None
    assert _overview.results({"metrics": {}}) is None


def test_clean_leaves_only_json() -> None:
    import numpy as np

    value = {"a": np.float32(1.5), "b": [math.nan, np.int64(3)], 3: np.array([1, 2])}
    assert json.loads(json.dumps(clean(value), allow_nan=False)) == {"a": 1.5, "b": [None, 3], "3": [1, 2]}


def test_peaks_are_the_strongest_value_of_each_feature_and_where() -> None:
    import torch

    from unweave.codes import SparseCode
    from unweave.web._data import peaks

    torch.manual_seed(0)
    dense = torch.randn(40, 30) * (torch.rand(40, 30) < 0.1)
    dense[:, 3] = 0
    found = peaks(SparseCode.from_dense(dense))
    assert [(f, round(v, 5)) for f, v, _ in found] == [
        (f, round(v, 5)) for f, v in SparseCode.from_dense(dense).top(30)
    ]
    assert all(dense[token, f].item() == pytest.approx(v) for f, v, token in found)
    assert 3 not in [f for f, _, _ in found]


# ---- colours --------------------------------------------------------------------------------------------------


def colours() -> dict[str, tuple[str, str]]:
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", static_text("site.css"))
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


def test_static_files_name_no_other_host() -> None:
    for name in ("site.css", "site.js", "contexts.js", "encode.js", "theme.js"):
        text = static_text(name).replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.M), name
        assert "@import" not in text
        assert "url(" not in text
        assert "innerHTML" not in text
