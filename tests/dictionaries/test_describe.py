"""Architectures in words: what `unweave archs` and the pages in docs/ say of a class."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Literal

import pytest
from typer.testing import CliRunner

import unweave.dictionaries
from unweave.cli._app import app
from unweave.dictionaries import names, registry
from unweave.dictionaries.describe import Architecture, describe
from unweave.dictionaries.topk import TopK, TopKConfig
from unweave.errors import UnweaveError

OURS = [name for name in names() if describe(name).kind.__module__.startswith("unweave.")]


class Config(TopKConfig):
    """
    Attributes:
        shape: how it is
            bent.
        first, second: two
            at once.

    Raises:
        third: not an attribute.
    """

    shape: Literal["round", "square"] = "round"
    first: int | None = None
    second: tuple[int, ...] = (1, 2)


class Sketch(TopK):
    """``z = f(u)``.

    More of it,
    on two lines.
    """

    Config = Config

    def loss(self, batch):
        return super().loss(batch)


@pytest.mark.parametrize("name", OURS)
def test_everything_that_ships_is_described(name):
    arch = describe(name)
    assert arch.summary
    assert arch.citation
    assert arch.good_for
    missing = [option.name for option in arch.options if not option.meaning]
    assert not missing, f"no meaning in the docstring of {arch.kind.Config.__name__} for {missing}"


def test_the_table_of_files_is_complete():
    """An architecture that its file registers, and no table names, would be known only after somebody imported it."""
    for module in pkgutil.walk_packages(unweave.dictionaries.__path__, "unweave.dictionaries."):
        importlib.import_module(module.name)
    ours = {name for name, kind in registry._REGISTRY.items() if kind.__module__.startswith("unweave.dictionaries.")}
    assert ours == registry._FILES.keys()
    assert all(getattr(unweave.dictionaries, name) for name in unweave.dictionaries._HOME)


def test_options_take_their_meaning_from_the_docstrings_of_all_their_configs():
    arch = Architecture(Sketch)
    options = {option.name: option for option in arch.options}
    assert options["shape"].meaning == "how it is bent."
    assert options["shape"].type == "round or square"
    assert options["first"].type == "int or None"
    assert options["first"].meaning == options["second"].meaning == "two at once."
    assert options["k"].meaning == "features per row."
    assert "d_in" not in options
    assert "third" not in options
    assert arch.paragraphs == ["``z = f(u)``.", "More of it, on two lines."]


def test_it_says_how_a_dictionary_learns():
    assert Architecture(TopK).training.startswith("in closed form")
    assert Architecture(Sketch).training == "by autograd"


def test_a_page_of_its_own_on_the_terminal():
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["archs", "jumprelu"]).output
    assert "bandwidth" in shown
    assert "||x - x_hat||^2" in shown
    assert "``" not in shown
    with pytest.raises(UnweaveError, match=r"no architecture 'jumpreul'.*jumprelu"):
        describe("jumpreul")
