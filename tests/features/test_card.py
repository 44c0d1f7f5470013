"""A feature's card, as notebooks show it: a frame that holds a page."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
import torch

from unweave.features import build_features, feature_card_html

VOID = {"meta", "base", "br", "img", "input", "link"}


class Reader(HTMLParser):
    """The elements of a page with their attributes, and a check that they close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def classed(self, name: str) -> list[dict[str, str]]:
        return [a for _, a in self.elements if name in a.get("class", "").split()]


def frame_of(html: str) -> dict[str, str]:
    """The attributes of the card's frame, which is all there is."""
    ((tag, attributes),) = Reader(html).elements
    assert tag == "iframe"
    return attributes


def page_of(html: str) -> str:
    return frame_of(html)["srcdoc"]


def test_the_card_is_well_formed_and_whole(hand_made):
    feature = hand_made[0]
    html = page_of(feature._repr_html_())
    assert html.startswith("<!doctype html>")
    page = Reader(html)
    peaks = page.classed("peak")
    assert len(peaks) == len(feature.top) + sum(len(q.contexts) for q in feature.quantiles)
    assert peaks[0]["data-tip"] == "cat  5.00"
    assert "h10" in peaks[0]["class"].split()
    assert len(page.classed("bar")) - 1 == (feature.histogram[1] > 0).sum()  # one is the bar over the contexts
    assert "Raises" in html
    assert "Strongest contexts" in html


def test_the_card_is_a_closed_frame_that_asks_for_nothing(hand_made):
    frame = frame_of(hand_made[0]._repr_html_())
    assert frame["title"] == "Feature 0"
    assert frame["sandbox"] == "allow-scripts"
    assert "src" not in frame
    html = frame["srcdoc"]
    page = Reader(html)
    assert not [a for _, a in page.elements if "src" in a or a.get("href", "#") != "#"]
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "@import" not in html
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_ids_are_unique_and_labels_have_their_targets(hand_made):
    page = Reader(page_of(feature_card_html(hand_made[0])))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)


def test_a_dead_feature_has_a_card(hand_made):
    html = page_of(feature_card_html(hand_made[3]))
    Reader(html)
    assert "Dead feature." in html
    assert "It fired on none of the 13 indexed rows" in html
    assert "Strongest contexts" not in html
    assert "Most similar" in html


def test_negative_values_are_told_apart_by_more_than_colour(hand_made):
    html = page_of(feature_card_html(hand_made[1]))
    assert 'class="tok n10 peak" data-tip="sat  −4.00"' in html
    assert "below zero on 2" in html
    assert "text-decoration: underline dotted" in html


def test_a_store_without_tokens_and_logits_has_cards(planted, tmp_path):
    store = build_features(
        tmp_path / "f", planted.dictionary(torch.tensor([[1.0], [2.0], [0.5]])),
        [planted.batch([(0, 0, [0, 1, 2], [0, 1, 2])])],
    )  # fmt: skip
    html = page_of(store[0]._repr_html_())
    page = Reader(html)
    assert "No logits" in html
    assert "Raises" not in html
    assert page.classed("ctx")


@pytest.mark.parametrize("link", ["/features/", lambda j: f"/features/{j}"])
def test_links(hand_made, link):
    linked = frame_of(feature_card_html(hand_made[0], link))
    assert '<a href="/features/1">1</a>' in linked["srcdoc"]
    # A page has no business in a frame this small, and may refuse to be in one.
    assert '<base target="_blank">' in linked["srcdoc"]
    assert linked["sandbox"] == "allow-scripts allow-popups allow-popups-to-escape-sandbox"
    plain = Reader(page_of(feature_card_html(hand_made[0])))
    assert {a["href"] for tag, a in plain.elements if tag == "a"} == {"#"}  # the switch of the contexts' length


def test_text_from_data_is_escaped(planted, tmp_path):
    words = [b"<script>alert(1)</script>", b'"><img src=x onerror=alert(1)>', b"\n", "\u202e".encode()]
    dense = torch.tensor([[1.0], [2.0], [0.5], [0.25]])
    store = build_features(
        tmp_path / "f", planted.dictionary(dense), [planted.batch([(0, 0, [0, 1, 2, 3], [0, 1, 2, 3])])],
        token_bytes=words, unembed=lambda d: d[:, :4],
    )  # fmt: skip
    html = page_of(feature_card_html(store[0], "/x?'\">"))
    page = Reader(html)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1  # its own
    assert "img" not in tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "↵" in html
    assert "\u202e" not in html
    assert "U+202E" in html
