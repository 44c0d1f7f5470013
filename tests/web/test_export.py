"""One self-contained file."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from unweave.errors import UnweaveError
from unweave.web import export_html


def test_the_file_asks_for_nothing_and_holds_everything(run: Any, english: Any, tmp_path: Path) -> None:
    path = export_html(run, [1, english.NASTY, english.DEAD, 1], tmp_path / "out" / "features.html")
    html = path.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#)', html)
    assert "url(" not in html
    assert re.findall(r'<article[^>]* id="(f\d+)"', html) == ["f1", f"f{english.NASTY}", f"f{english.DEAD}"]
    assert english.SCRIPT not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "Dead feature." in html
    assert "example/english-1b" in html
    assert html.count('class="ctx"') > 30
    for target in set(re.findall(r'href="#([^"]+)"', html)):
        assert f'id="{target}"' in html, target
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_its_policy_allows_its_own_script_only(run: Any, tmp_path: Path) -> None:
    html = export_html(run, [1], tmp_path / "one.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_bad_choices_are_told(run: Any, tmp_path: Path, english: Any) -> None:
    with pytest.raises(UnweaveError, match="numbered 0 to 219, found 220"):
        export_html(run, [1, 220], tmp_path / "x.html")
    with pytest.raises(UnweaveError, match="at least one feature"):
        export_html(run, [], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_the_notebook_card_is_here_too(run: Any) -> None:
    from unweave.web import feature_card_html

    assert "Feature 1" in feature_card_html(run.features[1])
