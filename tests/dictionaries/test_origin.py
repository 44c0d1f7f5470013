"""Whether a dictionary is known to belong where it is used."""

from __future__ import annotations

from typing import Any

import pytest

from unweave.dictionaries._origin import check_origin, same_model
from unweave.errors import UnweaveError

HERE = {"model": {"name": "owner/small", "sha256": "a" * 64}, "site": "layers.3", "target_site": "layers.3"}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("owner/small", "owner/small", True),
        ("owner/small", "another/small", False),
        ("owner/small", "/models/Small/", True),  # a folder that was downloaded
        ("small", "owner/small", True),
        ("small", "owner/large", False),
        ({"name": "a", "sha256": "1"}, {"name": "b", "sha256": "1"}, True),
        ({"name": "a", "sha256": "1"}, {"name": "a", "sha256": "2"}, False),
        ({"name": "owner/small", "revision": "1"}, {"name": "owner/small", "revision": "2"}, False),
        ({"name": "owner/small", "revision": "1"}, {"name": "owner/small", "revision": "1"}, True),
        ({"sha256": "1"}, "owner/small", None),
        ({}, {"name": "a"}, None),
    ],
)
def test_models_by_hash_revision_and_name(one: Any, other: Any, same: bool | None) -> None:
    assert same_model(one, other) is same
    assert same_model(other, one) is same


def test_what_belongs_passes() -> None:
    check_origin(None, HERE, "used at")  # made here
    check_origin({"model": "small", "site": "layers.3"}, HERE, "used at")
    check_origin({"model": None, "site": None}, {"kind": "array"}, "used at")  # rows of no model
    check_origin(HERE, {"site": "layers.3"}, "used at")
    check_origin(HERE, {**HERE, "model": {"model": HERE["model"]}}, "used at")


@pytest.mark.parametrize(
    ("trained_on", "words"),
    [
        (
            {**HERE, "model": "owner/large"},
            r"trained on model 'owner/large', but used at model 'owner/small' \(sha256 a",
        ),
        ({**HERE, "site": "layers.4", "target_site": None}, "trained on site 'layers.4', but used at site 'layers.3'"),
        ({**HERE, "target_site": "layers.3.mlp"}, "trained on target site 'layers.3.mlp'"),
        ({"site": "layers.3"}, "not known which model .* used at model 'owner/small'"),
        ({"model": "small"}, "not known which site .* used at site 'layers.3'"),
        ({}, r"force=True \(--force\)"),
    ],
)
def test_what_does_not_or_may_not_is_refused(trained_on: dict[str, Any], words: str) -> None:
    with pytest.raises(UnweaveError, match=words):
        check_origin(trained_on, HERE, "used at")


def test_rows_of_several_models_are_compared_one_by_one() -> None:
    both = {"site": "layers.3", "sources": [{"model": {"name": "a"}}, {"model": {"name": "b"}}]}
    check_origin(both, both, "used at")
    with pytest.raises(UnweaveError, match="trained on model 'b', but used at model 'a'"):
        check_origin(both, {**both, "sources": both["sources"][:1] * 2}, "used at")
