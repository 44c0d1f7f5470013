"""A grid of runs on one stream of activations: one harvest, one reading, one shuffle for all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.errors import UnweaveError
from unweave.runs.recipe import Recipe
from unweave.workflows.pipeline import Pipeline, Say, dictionary_config

if TYPE_CHECKING:
    from unweave.training import Trained

AXES = ("arch", "n_features", "k", "lr", "seed")


def sweep(
    recipe: Recipe, axes: Mapping[str, Sequence[Any]], folder: str | Path, say: Say = print
) -> dict[str, Trained]:
    """Train every combination of ``axes`` as a member of one grid (see :func:`unweave.training.train_many`).

    Every member's folder is a run folder: evaluate, index and open it like any other. Its seed is that of its first
    weights; the rows come in the same order for all.

    Args:
        recipe: what the members have in common; activations must be in a store, or stream from the model.
        axes: values to try, by name: arch, n_features, k (or the target L0), lr, seed.
        folder: gets a run folder per member, named after its values.

    Returns:
        What training left of each, by name.

    Raises:
        UnweaveError: for an unknown axis, an empty one, or no axis at all; whatever ``train_many`` raises.
    """
    from unweave.activations import RowStream
    from unweave.training import train_many

    if recipe.trackers:
        raise UnweaveError(f"sweep: trackers follow one run at a time; leave {recipe.trackers} out")
    if recipe.training.objective != "mse":
        raise UnweaveError("sweep: members learn from the same rows; train end to end one by one, with `unweave train`")
    recipes = _members(recipe, axes)
    first = Pipeline(recipe, folder, say)
    for member in recipes.values():  # mistakes should show before the work, not after
        dictionary_config(member, first.source if recipe.store is None else first.origin)
    store = first.store  # without one of its own, the sweep harvests into its folder
    if store is not None:
        recipes = {name: member.replace(store=str(store.folder.resolve())) for name, member in recipes.items()}
    members = {}
    for name, member in recipes.items():
        run = Pipeline(member, Path(folder) / name, _saying(say, name))
        run.share(first)
        members[name] = run.build() if (run.folder / "training.json").is_file() else run.prepare()
    config = next(iter(members.values()))[1]
    trained = train_many(members, RowStream(first.origin, seed=config.seed), folder)
    for name, result in trained.items():
        for sentence in result.health:
            say(f"{name}: note: {sentence}")
    return trained


def _saying(say: Say, name: str) -> Say:
    return lambda line: say(f"{name}: {line}")


def _members(recipe: Recipe, axes: Mapping[str, Sequence[Any]]) -> dict[str, Recipe]:
    from unweave.dictionaries import get

    for axis, values in axes.items():
        if axis not in AXES:
            raise UnweaveError(f"sweep: no axis {axis!r}; there are {', '.join(AXES)}")
        if len(set(values)) != len(values) or not values:
            raise UnweaveError(f"sweep: {axis} needs values that differ, found {list(values)}")
    if not axes:
        raise UnweaveError(f"sweep: give values of at least one of {', '.join(AXES)}")
    members = {}
    for point in itertools.product(*axes.values()):
        chosen = dict(zip(axes, point))
        dictionary = recipe.dictionary
        if "arch" in chosen and chosen["arch"] != dictionary.arch:
            dictionary = dictionary.replace(arch=chosen["arch"], options={})
        if "k" in chosen:
            kept = {name: value for name, value in dictionary.options.items() if name not in ("k", "target_l0")}
            dictionary = dictionary.replace(options=kept | get(dictionary.arch).sparsity_option(chosen["k"]))
        named = {field: chosen[field] for field in ("n_features", "seed") if field in chosen}
        dictionary = dictionary.replace(**named)
        training = recipe.training.replace(lr=chosen["lr"]) if "lr" in chosen else recipe.training
        name = "-".join(value if axis == "arch" else f"{axis}{value:.15g}" for axis, value in chosen.items())
        members[name] = recipe.replace(dictionary=dictionary, training=training)
    return members
