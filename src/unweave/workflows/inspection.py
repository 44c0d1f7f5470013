"""What a folder or model is, in a few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unweave import formats
from unweave.errors import UnweaveError
from unweave.files import read_json

Rows = list[tuple[str, str]]


def card(thing: str | Path, verify: bool = False) -> tuple[str, Rows]:
    """A title and rows of name and value for a run, dictionary, store, model or checkpoint.

    Raises:
        UnweaveError: when it is none of these, or ``verify`` finds damage.
    """
    if not isinstance(thing, Path):
        within = any(p.is_file() for p in Path(thing).parents)  # an archive
        # A model on the hub is owner/name; what goes on behind that is a checkpoint in a repository.
        return _checkpoint(thing) if within or thing.count("/") > 1 else _model(thing)
    if thing.is_file() and formats.holds_weights(thing):
        return _checkpoint(thing)
    kind = _format(thing)
    if (thing / "dictionary" / "config.json").is_file():
        return _run(thing)
    if kind.startswith("unweave.dictionary"):
        return _dictionary(thing)
    if formats.recognised(thing):
        return _checkpoint(thing)
    if kind.startswith("unweave.activations"):
        return _activations(thing, verify)
    if kind.startswith("unweave.features"):
        return _features(thing)
    if (thing / "config.json").is_file() or thing.suffix == ".gguf" or any(thing.glob("*.gguf")):
        return _model(str(thing))
    if formats.holds_weights(thing):
        return _checkpoint(thing)  # says why it is none
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
    _, rows = _dictionary(folder / "dictionary")
    if run.recipe:
        against = run.recipe.get("against")
        rows += [
            ("model", run.recipe["model"]["name"]),
            *([("against", against["name"])] if against else []),
            ("site", run.recipe["source"]["site"]),
            ("text", _named(run.recipe["data"]["documents"])),
        ]
    for name, entry in (run.evaluation or {}).get("metrics", {}).items():
        if entry.get("value") is not None:
            known = entry["low"] is not None
            interval = f"  [{entry['low']:.4g}, {entry['high']:.4g}]" if known else ""
            rows.append((name, f"{entry['value']:.4g}{interval}"))
    rows.append(("features", repr(run.features) if run.features is not None else "not indexed"))
    for stage, facts in run.provenance.get("stages", {}).items():
        rows.append((f"{stage} took", f"{facts['seconds']:.0f} s"))
    return f"run {folder}", rows


def _named(documents: Any) -> str:
    """The data of a recipe: one name, or those of a mix."""
    return documents if isinstance(documents, str) else ", ".join(part["documents"] for part in documents)


def _dictionary(folder: Path) -> tuple[str, Rows]:
    from unweave.dictionaries import Dictionary

    dictionary = Dictionary.load(folder)
    n_parameters = sum(p.numel() for p in dictionary.parameters())
    rows = [("architecture", dictionary.name)]
    rows += [(name, str(value)) for name, value in dictionary.config.to_dict().items()]
    return f"dictionary {folder}", [*rows, ("parameters", f"{n_parameters:,}")]


def _checkpoint(thing: str | Path) -> tuple[str, Rows]:
    return f"checkpoint {thing}", formats.inspect(thing).rows()


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
