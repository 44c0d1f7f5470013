"""An activation store in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unweave.activations.store import ActivationStore


def describe(store: ActivationStore) -> list[tuple[str, str]]:
    """(what, value) pairs for a table: the counts, then the provenance."""
    per_item = f"{store.n_tokens / store.n_items:.1f} a context" if store.n_items else "none yet"
    return [
        ("folder", str(store.folder)),
        ("state", "complete" if store.complete else "unfinished (run the same harvest again to go on)"),
        ("rows", f"{store.n_rows:,} of width {store.d_in}, {dtype_words(store)}"),
        ("target", f"width {store.d_out}, stored apart" if store.has_target else "the input itself"),
        *([("side", f"width {store.d_side}, {store.manifest.side_dtype}")] if store.d_side else []),
        ("contexts", f"{store.n_items:,} in {store.n_batches:,} batches"),
        ("tokens", f"{store.n_tokens:,} ({per_item}; {store.n_tokens - store.n_rows:,} without a row)"),
        ("shards", f"{store.n_shards}, {size_words(store.bytes)}"),
    ] + [(key, _words(value)) for key, value in store.provenance.items()]


def dtype_words(store: ActivationStore) -> str:
    """``bfloat16``, or ``int8 read as bfloat16``."""
    rows = store.manifest.rows_dtype
    return f"{store.manifest.dtype}{f' read as {rows}' if rows else ''}"


def size_words(n: float) -> str:
    """``75.5 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(v)}" for key, v in value.items())
    if isinstance(value, list):
        return "; ".join(_words(v) for v in value)
    return str(value)
