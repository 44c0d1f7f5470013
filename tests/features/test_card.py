from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch

from unweave.features import build_features, feature_card_html


class Reader(HTMLParser):
    """The elements of a page with their attributes, and a check that they close in order."""

    VOID = ("br", "line", "rect/")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_card_is_well_formed_and_whole(hand_made):
    html = hand_made[0]._repr_html_()
    page = Reader(html)
    marks = [a for tag, a in page.elements if tag == "mark"]
    assert len(marks) == len(hand_made[0].top) + sum(len(q.contexts) for q in hand_made[0].quantiles)
    assert marks[0]["title"] == "5"
    assert "uw-10" in (marks[0]["class"] or "")
    bars = [a for tag, a in page.elements if tag == "rect"]
    assert len(bars) == len(hand_made[0].histogram[1])
    assert "prefers-color-scheme: dark" in html
    assert "Raises" in html
    assert "src=" not in html
    assert "http" not in html


def test_a_dead_feature_has_a_card(hand_made):
    html = feature_card_html(hand_made[3])
    Reader(html)
    assert "Never fired" in html
    assert "Strongest contexts" not in html


def test_negative_values_are_told_apart_by_more_than_colour(hand_made):
    html = feature_card_html(hand_made[1])
    assert 'uw-negative uw-10" title="−4"' in html
    assert "negative in 2 rows" in html


@pytest.mark.parametrize("link", ["/features/", lambda j: f"/features/{j}"])
def test_links(hand_made, link):
    assert '<a href="/features/1">1</a>' in feature_card_html(hand_made[0], link)
    assert "<a " not in feature_card_html(hand_made[0])


def test_text_from_data_is_escaped(planted, tmp_path):
    words = [b"<script>alert(1)</script>", b'"><img src=x onerror=alert(1)>', b"\n"]
    dense = torch.tensor([[1.0], [2.0], [0.5]])
    store = build_features(
        tmp_path / "f", planted.dictionary(dense), [planted.batch([(0, 0, [0, 1, 2], [0, 1, 2])])],
        token_bytes=words, unembed=lambda d: d[:, :3],
    )  # fmt: skip
    html = feature_card_html(store[0], "/x?'\">")
    page = Reader(html)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "↵" in html
