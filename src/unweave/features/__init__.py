"""FeatureStore: what each feature of a dictionary answers to, built in one pass, opened in milliseconds."""

from typing import Any

from unweave.features._tokens import decode_tokens
from unweave.features.build import build_features, build_features_of_codes, merge
from unweave.features.config import IndexConfig
from unweave.features.feature import Context, Feature, FeaturePage, FeatureSummary, Origin, Quantile
from unweave.features.store import FeatureStore

__all__ = [
    "Context",
    "Feature",
    "FeaturePage",
    "FeatureStore",
    "FeatureSummary",
    "IndexConfig",
    "Origin",
    "Quantile",
    "build_features",
    "build_features_of_codes",
    "decode_tokens",
    "feature_card_html",
    "merge",
]


def feature_card_html(feature: Feature, link: Any = None) -> str:
    """One feature as self-contained HTML; ``link`` is a prefix such as ``"/features/"`` or a function of the number."""
    from unweave.features.card.page import feature_card_html  # jinja2, imported where a card is wanted

    return feature_card_html(feature, link)
