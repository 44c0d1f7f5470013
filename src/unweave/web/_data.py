"""What the JSON API returns, as plain dictionaries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def clean(value: Any) -> Any:
    """Numbers that JSON knows: numpy scalars become Python's, NaN and infinity become null."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return clean(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def run_data(overview: Any) -> dict[str, Any]:
    run, dictionary = overview.run, overview.dictionary
    return clean(
        {
            "name": overview.name,
            "architecture": getattr(dictionary, "name", None),
            "n_features": overview.n_features,
            "d_in": getattr(dictionary, "d_in", None),
            "d_out": getattr(dictionary, "d_out", None),
            "model": overview.model,
            "site": overview.site,
            "indexed": run.features is not None,
            "evaluation": run.evaluation,
            "metrics": run.metrics,
            "recipe": run.recipe,
            "provenance": run.provenance,
        }
    )


def summary_data(row: Any) -> dict[str, Any]:
    return clean(
        {
            "index": row.index,
            "density": row.density,
            "n_firing": row.n_firing,
            "max_value": row.max_value,
            "mean_value": row.mean_value,
            "relative": row.relative,
            "origin": vars(row.origin) if row.origin else None,
            "top_tokens": list(row.top_tokens),
            "snippet": {"tokens": list(row.snippet_tokens), "values": list(row.snippet_values)},
        }
    )


def context_data(context: Any) -> dict[str, Any]:
    names = ("document", "position", "tokens", "values", "peak", "value")
    return clean({name: getattr(context, name) for name in names})


def feature_data(f: Any) -> dict[str, Any]:
    edges, counts = f.histogram
    return clean(
        {
            "index": f.index,
            "density": f.density,
            "n_firing": f.n_firing,
            "n_negative": f.n_negative,
            "n_items": f.n_items,
            "max_value": f.max_value,
            "mean_value": f.mean_value,
            "is_dead": bool(f.is_dead),
            "histogram": {"edges": list(edges), "counts": list(counts)},
            "top": [context_data(c) for c in f.top],
            "quantiles": [
                {"low": q.low, "high": q.high, "contexts": [context_data(c) for c in q.contexts]} for q in f.quantiles
            ],
            "positive_logits": [{"token": t, "value": v} for t, v in f.positive_logits],
            "negative_logits": [{"token": t, "value": v} for t, v in f.negative_logits],
            "similar": [{"feature": j, "cosine": c} for j, c in f.similar],
            "cofiring": [{"feature": j, "probability": p, "lift": lift} for j, p, lift in f.cofiring],
            "top_tokens": [{"token": t, "share": s} for t, s in f.top_tokens],
            "parts": [{"part": part, "share": share} for part, share in f.part_shares],
            "origin": vars(f.origin) if f.origin else None,
        }
    )


def tokens_data(text_code: Any) -> list[dict[str, Any]]:
    """Each token with all features that fire on it as ``[feature, value]``, strongest first."""
    code = text_code.code
    offsets, indices = code.offsets.tolist(), code.indices.tolist()
    values = code.values.float().tolist()
    made = []
    for i, token in enumerate(text_code.tokens):
        fired = [(indices[j], _short(values[j])) for j in range(offsets[i], offsets[i + 1]) if values[j] != 0]
        fired.sort(key=lambda pair: -abs(pair[1]))
        made.append({"text": token, "n_firing": len(fired), "features": fired})
    return clean(made)


def peaks(code: Any) -> list[tuple[int, float, int]]:
    """Every feature that fires in a text, as ``(feature, peak value, token)``, the strongest first."""
    values = code.values.float().numpy()
    order = np.argsort(-np.abs(values), kind="stable")
    order = order[values[order] != 0]
    features = code.indices.numpy()[order]
    _, first = np.unique(features, return_index=True)
    at = order[np.sort(first)]
    return list(zip(code.indices.numpy()[at].tolist(), values[at].tolist(), code.rows.numpy()[at].tolist()))


def _short(value: float) -> float:
    """Five significant digits: the code has thousands of values and the page prints three."""
    return float(f"{value:.5g}") if math.isfinite(value) else value
