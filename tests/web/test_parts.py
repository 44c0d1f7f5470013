"""The pieces under the pages: curves, the results table, JSON, static files."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re

import pytest

from unweave.web import _charts, _overview
from unweave.web._data import clean
from unweave.web._render import static_text


@pytest.mark.parametrize("module", ["_security", "_encoder"])
def test_examples_in_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"unweave.web.{module}")).failed == 0


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


def test_static_files_name_no_other_host() -> None:
    for name in ("feature.css", "site.css", "site.js", "contexts.js", "encode.js", "theme.js"):
        text = static_text(name).replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.M), name
        assert "@import" not in text
        assert "url(" not in text
        assert "innerHTML" not in text
