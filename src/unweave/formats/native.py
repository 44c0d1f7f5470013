"""unweave's own dictionaries: ``config.json`` and ``dictionary.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unweave.dictionaries import Dictionary
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats.containers import Settings
from unweave.formats.registry import Format, register

CONFIG, WEIGHTS, TRAINING = "config.json", "dictionary.safetensors", "training.json"


@register("unweave")
class Native(Format):
    """What ``Dictionary.save`` writes."""

    title = "unweave"
    checked = "library"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        ours = str(checkpoint.quiet_settings(CONFIG).get("format", object)).startswith("unweave.dictionary")
        return 1.0 if ours and checkpoint.find(WEIGHTS) else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors = checkpoint.settings(CONFIG), checkpoint.tensors(WEIGHTS)
        trained = _training(checkpoint, config)
        site, target = _at(trained, "data", "site"), _at(trained, "data", "target_site")
        how = {
            "model's revision": _at(trained, "data", "model", "revision"),
            "data": _at(trained, "data", "data", "spec") or _at(trained, "data", "data", "name"),
            "context size": _at(trained, "data", "context_size"),
            "rows trained on": _at(trained, "config", "n_rows"),
            "steps": _at(trained, "steps"),
        }
        shown = {k: v for k, v in config.items() if k not in ("format", "arch", "d_in", "d_out", "n_features", "k")}
        return Facts(
            self.name,
            config.need("arch", str),
            d_in=config.size("d_in"),
            d_out=config.size("d_out"),
            n_features=config.size("n_features"),
            k=config.get("k", float),
            dtype=next((info.dtype for info in tensors.info.values() if len(info.shape) == 2), None),
            model=_at(trained, "data", "model", "name"),
            models=tuple(str(_at(one, "model", "name")) for one in _sources(trained)),
            site=site,
            target_site=target if target != site else None,
            context=shown | how,
        )

    def read(self, checkpoint: Checkpoint, **options: Any) -> Dictionary:
        return Dictionary.load(checkpoint.whole(CONFIG, WEIGHTS))

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        dictionary.save(folder)


def _training(checkpoint: Checkpoint, config: Settings) -> dict[str, Any]:
    """Training's own record, beside the dictionary or (in a run) above it, if it is of this dictionary."""
    for place in (checkpoint, checkpoint.at(checkpoint.folder.parent)):
        found = dict(place.quiet_settings(TRAINING))
        of = found.get("dictionary")
        if isinstance(of, dict) and of and all(config.get(name, object) == value for name, value in of.items()):
            return found
    return {}


def _sources(trained: dict[str, Any]) -> list[Any]:
    """Of rows of several models, what is known of each one's."""
    data = trained.get("data")
    found = data.get("sources") if isinstance(data, dict) else None
    return found if isinstance(found, list) else []


def _at(values: Any, *names: str) -> Any:
    """What a record says in nested mappings; None where it does not."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, str | int) else None
