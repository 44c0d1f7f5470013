"""What a folder or model is, in a few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unweave import formats
from unweave.errors import UnweaveError
from unweave.files import read_json
from unweave.formats import stores

Rows = list[tuple[str, str]]


def card(thing: str | Path, verify: bool = False, **options: Any) -> tuple[str, Rows]:
    """A title and rows of name and value for a run, dictionary, store (also another library's), model or checkpoint.

    Args:
        options: of another library's files, what they do not say.

    Raises:
        UnweaveError: when it is none of these, or ``verify`` finds damage.
    """
    if not isinstance(thing, Path):
        within = any(p.is_file() for p in Path(thing).parents)  # an archive
        if within or thing.count("/") > 1 or "@" in thing or formats.catalogue.find(thing) is not None:
            return _checkpoint(thing, **options)
        return _repository(thing, **options) if "/" in thing else _model(thing)
    if thing.is_file() and formats.holds_weights(thing):
        return _checkpoint(thing, **options)
    kind = _format(thing)
    if any((thing / name).is_file() for name in ("dictionary/config.json", "features/manifest.json")):
        return _run(thing)
    if formats.recognised(thing):
        return _checkpoint(thing, **options)
    if kind.startswith("unweave.activations"):
        return _activations(thing, verify)
    if kind.startswith("unweave.features"):
        return _features(thing)
    if stores.recognised(thing):
        return f"store {thing}", stores.open_store(thing, **options).facts()
    if (thing / "config.json").is_file() or thing.suffix == ".gguf" or any(thing.glob("*.gguf")):
        return _model(str(thing))
    if formats.holds_weights(thing):
        return _checkpoint(thing, **options)  # says why it is none
    raise UnweaveError(f"{thing} is neither a run, a dictionary, a store nor a model folder")


def _format(folder: Path) -> str:
    for name in ("manifest.json", "config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            return str(values.get("format", "")) if isinstance(values, dict) else ""
    return ""


def _run(folder: Path) -> tuple[str, Rows]:
    from unweave.runs import Run

    run = Run(folder)
    rows = [("dictionary", "none, imported codes")]
    if run.has_dictionary:
        rows = formats.inspect(folder / "dictionary").rows()
    if against := (run.recipe or {}).get("against"):
        rows.append(("against", against["name"]))
    source = run.provenance.get("source") or {}
    if source.get("kind") == "imported":
        model = source.get("model") or {}
        rows += [("codes of", source["library"]), ("model", model.get("name", "unknown"))]
        rows.append(("site", source.get("site", "unknown")))
    for name, entry in (run.evaluation or {}).get("metrics", {}).items():
        if entry.get("value") is not None:
            known = entry["low"] is not None
            interval = f"  [{entry['low']:.4g}, {entry['high']:.4g}]" if known else ""
            rows.append((name, f"{entry['value']:.4g}{interval}"))
    rows.append(("features", repr(run.features) if run.features is not None else "not indexed"))
    for stage, facts in run.provenance.get("stages", {}).items():
        rows.append((f"{stage} took", f"{facts['seconds']:.0f} s"))
    return f"run {folder}", rows


def _checkpoint(thing: str | Path, **options: Any) -> tuple[str, Rows]:
    return f"checkpoint {thing}", formats.inspect(thing, **options).rows()


def _repository(name: str, **options: Any) -> tuple[str, Rows]:
    """What ``owner/name`` on the hub holds: a dictionary, known by its headers, or else a model."""
    try:
        return _checkpoint(name, **options)
    except UnweaveError as no_checkpoint:
        try:
            return _model(name)
        except UnweaveError as no_model:
            raise UnweaveError(f"{name} is no dictionary: {no_checkpoint}. And no model: {no_model}") from None


def _activations(folder: Path, verify: bool) -> tuple[str, Rows]:
    from unweave.activations import ActivationStore

    store = ActivationStore.open(folder)
    rows = store.describe()
    if verify:
        store.verify()
        rows = [*rows, ("hashes", "every shard verified")]
    return f"activation store {folder}", rows


def _features(folder: Path) -> tuple[str, Rows]:
    from unweave.features import FeatureStore

    store = FeatureStore.open(folder)
    return f"feature store {folder}", [
        ("store", repr(store)),
        *((k, str(v)) for k, v in store.manifest["counts"].items()),
    ]


def _model(name: str) -> tuple[str, Rows]:
    from unweave.sources import LanguageModel

    model = LanguageModel.load(name)
    facts = [("layers", str(model.n_layers)), ("width", str(model.d_model)), ("dtype", str(model.dtype))]
    return f"model {name}", [*facts, *((site, model.site(site).describe()) for site in model.sites())]
