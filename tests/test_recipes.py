"""The recipes are valid, and the demo's is the demo."""

from pathlib import Path

import pytest

from unweave.runs.recipe import Recipe
from unweave.workflows.demo import demo_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads(path):
    assert Recipe.read(path, {}, []).source.site


def test_the_demo_is_the_recipe_of_its_name():
    path = next(p for p in RECIPES if p.stem == "smollm2-135m-layer12-batchtopk")
    assert Recipe.read(path, {}, []) == demo_recipe()
