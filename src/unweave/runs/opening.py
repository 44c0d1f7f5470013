"""From a recipe to open things: the model, its documents, the source of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from unweave.runs.recipe import ModelRecipe, Recipe
    from unweave.sources import Documents, JoinedSource, LanguageModel, TextSites, TextSource


def open_model(recipe: Recipe) -> LanguageModel:
    return _load(recipe.model)


def open_against(recipe: Recipe, model: LanguageModel) -> LanguageModel | None:
    """The model that the recipe's is compared with, made to read the same tokens; None where there is none.

    Raises:
        UnweaveError: when the two are of different tokenizers.
    """
    return None if recipe.against is None else _load(recipe.against).reading_as(model)


def _load(model: ModelRecipe) -> LanguageModel:
    from unweave.sources import LanguageModel

    return LanguageModel.load(model.name, revision=model.revision, dtype=model.dtype, device=model.device)


def open_documents(recipe: Recipe) -> Documents:
    from unweave.sources import DistinctDocuments, MixedDocuments, read_documents

    data = recipe.data
    whole = None if data.dedup else data.limit  # a limit is of what is given in the end
    if isinstance(data.documents, str):
        documents = read_documents(
            data.documents, text_field=data.text_field, seed=data.seed, limit=whole, format=data.format
        )
    else:
        parts = [
            read_documents(
                part.documents,
                text_field=part.text_field or data.text_field,
                seed=data.seed,
                limit=part.limit,
                format=data.format,
            )
            for part in data.documents
        ]
        weights = [part.weight for part in data.documents]
        documents = MixedDocuments(parts, weights, seed=data.seed, limit=whole)
    return DistinctDocuments(documents, data.dedup, limit=data.limit) if data.dedup else documents


def open_source(
    recipe: Recipe,
    model: LanguageModel,
    documents: Documents,
    split: Literal["train", "held_out", "all"] = "train",
    with_side: bool = True,
    against: LanguageModel | None = None,
) -> TextSource | JoinedSource:
    """The recipe's source; without its side inputs for what only reads activations.

    With a model ``against``, rows of both side by side, one for every token that has one in both.
    """
    from unweave.sources import JoinedSource, TextSource

    source = recipe.source
    options = {**_source_options(recipe), "split": split, "side": source.side if with_side else None}
    each = [
        TextSource(one, documents, source.site, target_site=source.target_site, **options)
        for one in (model, against)
        if one is not None
    ]
    return each[0] if len(each) == 1 else JoinedSource(each)


def open_sites(recipe: Recipe, model: LanguageModel, documents: Documents, sites: Sequence[str]) -> TextSites:
    """The recipe's source at several sites instead of its own."""
    from unweave.sources import TextSites

    source = recipe.source
    return TextSites(
        model, documents, sites, target_site=source.target_site, side=source.side, **_source_options(recipe)
    )


def _source_options(recipe: Recipe) -> dict[str, Any]:
    names = ("context_size", "batch_tokens", "bos", "keep_special", "max_norm_ratio")
    return {name: getattr(recipe.source, name) for name in names}
