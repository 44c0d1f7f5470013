"""unweave's own dictionaries: ``config.json`` and ``dictionary.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unweave.dictionaries import Dictionary
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats.containers import Settings
from unweave.formats.registry import Format, register

CONFIG, WEIGHTS = "config.json", "dictionary.safetensors"


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
        # Of a run: what its provenance says of its rows.
        run = checkpoint.folder.parent / "provenance.json"
        known = Checkpoint(run).quiet_settings(run.name) if run.is_file() else Settings({}, CONFIG)
        source = known.section("source")
        site, target = source.get("site", str), source.get("target_site", str)
        shown = {k: v for k, v in config.items() if k not in ("format", "arch", "d_in", "d_out", "n_features", "k")}
        return Facts(
            self.name,
            config.need("arch", str),
            d_in=config.size("d_in"),
            d_out=config.size("d_out"),
            n_features=config.size("n_features"),
            k=config.get("k", float),
            dtype=next((info.dtype for info in tensors.info.values() if len(info.shape) == 2), None),
            model=source.section("model").get("name", str),
            site=site,
            target_site=target if target != site else None,
            context=shown,
        )

    def read(self, checkpoint: Checkpoint, **options: Any) -> Dictionary:
        return Dictionary.load(checkpoint.folder)

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        dictionary.save(folder)
