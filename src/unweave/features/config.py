"""What a FeatureStore keeps of each feature."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from unweave.config import Config


class IndexConfig(Config):
    """How much of each feature is kept and shown. The defaults suit a browser and an explainer.

    Attributes:
        n_top: the items (contexts) with the largest peak that are kept, exactly.
        n_sample: size of the uniform sample of firings behind quantiles, top tokens and co-firing.
        n_intervals: how many value intervals, of equally many sampled firings, the quantile contexts come from.
        per_interval: contexts shown of each interval.
        before: tokens shown before the peak of a context. after: tokens shown after it.
        n_similar: nearest features by cosine of decoder directions.
        n_cofiring: features that fire on the same tokens.
        n_logits: output tokens raised most, and as many lowered most.
        n_top_tokens: tokens the feature fires on most.
        seed: of the sample.
    """

    n_top: PositiveInt = 20
    n_sample: PositiveInt = 200
    n_intervals: PositiveInt = 5
    per_interval: PositiveInt = 5
    before: NonNegativeInt = 24
    after: NonNegativeInt = 16
    n_similar: NonNegativeInt = 10
    n_cofiring: NonNegativeInt = 10
    n_logits: NonNegativeInt = 10
    n_top_tokens: NonNegativeInt = 10
    seed: NonNegativeInt = 0
