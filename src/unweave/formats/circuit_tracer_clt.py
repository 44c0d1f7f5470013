"""circuit-tracer's cross-layer transcoders: a folder with ``W_enc_{i}.safetensors`` and ``W_dec_{i}.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import yaml

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import write_tensors, write_text
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._cross_layer import Layer, cross_layer, layers_of
from unweave.formats._facts import Facts
from unweave.formats.catalogue import Entry
from unweave.formats.circuit_tracer import in_a_layer
from unweave.formats.containers import Settings
from unweave.formats.registry import Format, register


@register("circuit-tracer-clt")
class CircuitTracerCLT(Format):
    """``W_enc_i (F, d)``, ``b_enc_i``, ``b_dec_i``, ``threshold_i`` for JumpReLU; ``W_dec_i (F, n_layers - i, d)``.

    Decoder i writes into the layers i to the last; nothing is subtracted. A row of the dictionary holds what all layers
    read side by side, its output what they write. The library's class may have a skip, which its files do not hold.
    """

    title = "circuit-tracer's CLT"
    checked = "library"
    repositories: ClassVar[dict[str, str]] = {
        "mntss/clt-gemma-2-2b-426k": "google/gemma-2-2b",
        "mntss/clt-gemma-2-2b-2.5M": "google/gemma-2-2b",
        "mntss/clt-llama-3.2-1b-524k": "meta-llama/Llama-3.2-1B",
    }

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        found = checkpoint.find("W_enc_0.safetensors") and checkpoint.find("W_dec_0.safetensors")
        return 0.95 if found else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        n = _n_layers(checkpoint)
        first = checkpoint.tensors("W_enc_0.safetensors")
        per, d = first.shape("W_enc_0", 2)
        config = checkpoint.settings("config.yaml") if checkpoint.beside("config.yaml") else Settings({}, "config.yaml")
        skips = any("skip" in name.lower() for name in first)
        return Facts(
            self.name,
            "clt",
            d_in=n * d,
            d_out=n * checkpoint.tensors("W_dec_0.safetensors").shape("W_dec_0", 3)[2],
            n_features=n * per,
            dtype=first.info["W_enc_0"].dtype,
            model=config.get("model_name", str),
            hook=config.get("feature_input_hook", str),
            context={"layers": n, "writes to": config.get("feature_output_hook", str)},
            notes=("rows hold the layers side by side",),
            missing="it has a skip, which circuit-tracer neither writes nor reads, so nobody knows how"
            if skips
            else None,
        )

    def parts(self, checkpoint: Checkpoint) -> Dictionary:
        return cross_layer([_layer(checkpoint, i) for i in range(_n_layers(checkpoint))], checkpoint.called)

    def named(self, repository: str, file: str) -> Entry | None:
        return Entry(self.name, repository) if file == "W_enc_0.safetensors" else None

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        for i, layer in enumerate(layers_of(dictionary, self.title, "relu", "jumprelu")):
            tensors = {f"{name}_{i}": getattr(layer, name) for name in ("W_enc", "b_enc", "b_dec")}
            if layer.threshold is not None:
                tensors[f"threshold_{i}"] = layer.threshold
            write_tensors(folder / f"W_enc_{i}.safetensors", tensors)
            write_tensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": layer.W_dec})
        config = {"model_name": facts.model, "model_kind": "cross_layer_transcoder"}
        config |= {
            "feature_input_hook": in_a_layer(facts.hook) or "hook_resid_mid",
            "feature_output_hook": "hook_mlp_out",
        }
        write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def _n_layers(checkpoint: Checkpoint) -> int:
    n = 0
    while checkpoint.find(f"W_enc_{n}.safetensors"):
        n += 1
    found = sum(name.startswith("W_enc_") and name.endswith(".safetensors") for name in checkpoint.names)
    if found != n:
        raise UnweaveError(f"{checkpoint.called}: W_enc_{n}.safetensors is missing, there are {found} of such files")
    return n


def _layer(checkpoint: Checkpoint, i: int) -> Layer:
    read, write = (checkpoint.tensors(f"W_{which}_{i}.safetensors") for which in ("enc", "dec"))
    (per, d), shape = read.shape(f"W_enc_{i}", 2), write.shape(f"W_dec_{i}", 3)
    threshold = f"threshold_{i}"
    return Layer(
        read.read(f"W_enc_{i}", per, d),
        read.read(f"b_enc_{i}", per),
        read.read(f"b_dec_{i}", shape[2]),
        write.read(f"W_dec_{i}", *shape),
        read[threshold].flatten() if threshold in read else None,
    )
