"""circuit-tracer's transcoders, one layer a file: ``layer_{i}.safetensors`` and ``config.yaml``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import yaml

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import write_tensors, write_text
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts, hook_of_site, site_of_hook
from unweave.formats._fold import Parts, skip_name, with_skip
from unweave.formats._plain import plain
from unweave.formats.catalogue import Entry
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, register

_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_THRESHOLD = "activation_function.threshold"
_NAME = re.compile(r"layer_(\d+)\.safetensors")


@register("circuit-tracer")
class CircuitTracer(Format):
    """``W_enc (F, d)``, ``W_dec (F, d_out)``, biases, a skip ``W_skip (d_out, d)``; nothing is subtracted.

    A threshold makes it JumpReLU, a ``k`` in the file or ``activation: topk`` in its settings TopK; else it is ReLU.
    The library has TopK, but files of its own do not say it, and its reader takes them as ReLU: ``k=`` says so here,
    and TopK is not written. Of the k largest it lets negative values through, unweave does not.
    """

    title = "circuit-tracer"
    checked = "library"
    options: ClassVar[dict[str, str]] = {"k": "makes it TopK, which its files do not say"}
    repositories: ClassVar[dict[str, str]] = {
        "mwhanna/qwen3-0.6b-transcoders-lowl0": "Qwen/Qwen3-0.6B",
        "mwhanna/qwen3-1.7b-transcoders-lowl0": "Qwen/Qwen3-1.7B",
        "mwhanna/qwen3-4b-transcoders": "Qwen/Qwen3-4B",
        "mwhanna/qwen3-8b-transcoders": "Qwen/Qwen3-8B",
        "mwhanna/qwen3-14b-transcoders": "Qwen/Qwen3-14B",
        "mwhanna/qwen3-14b-transcoders-lowl0": "Qwen/Qwen3-14B",
        "mntss/transcoder-Llama-3.2-1B": "meta-llama/Llama-3.2-1B",
    }

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        layers = _layers(checkpoint)
        if not (layers and checkpoint.keys(layers[0]) >= _KEYS):
            return None
        info = checkpoint.tensors(layers[0]).info
        return 0.85 if info["W_enc"].shape[:1] == info["b_enc"].shape else None

    def inspect(self, checkpoint: Checkpoint, k: int | None = None) -> Facts:
        tensors, config = self._open(checkpoint)
        (n_features, d_in), d_out = tensors.shape("W_enc", 2), tensors.shape("W_dec", 2)[1]
        layers = _layers(checkpoint)
        layer = _NAME.fullmatch(layers[0]) if len(layers) == 1 else None
        activation, hook, missing = _activation(tensors, config, k), config.get("feature_input_hook", str), None
        if activation == "topk":
            k = _k(tensors, config, k)
            missing = None if k else "k is not in the file: give k="
        site = target = None
        if layer:
            site, target = (
                site_of_hook(f"blocks.{layer[1]}.{config.get(f'feature_{way}_hook', str)}")
                for way in ("input", "output")
            )
            target = target or f"layers.{layer[1]}.mlp"
        if len(layers) > 1:
            missing = f"it holds {len(layers)} layers, each of them a dictionary: name one of the files, as {layers[0]}"
        return Facts(
            self.name,
            str(skip_name(activation)) if "W_skip" in tensors else activation,
            d_in,
            d_out,
            n_features,
            k=k if activation == "topk" else None,
            dtype=tensors.info["W_enc"].dtype,
            model=config.get("model_name", str),
            site=site,
            target_site=target if target != site else None,
            hook=hook,
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint, k: int | None = None) -> Parts:
        tensors, config = self._open(checkpoint)
        (n_features, d_in), d_out = tensors.shape("W_enc", 2), tensors.shape("W_dec", 2)[1]
        activation, threshold = _activation(tensors, config, k), None
        if activation == "jumprelu":
            raw = tensors[_THRESHOLD].flatten()
            threshold = tensors.number(_THRESHOLD) if len(raw) == 1 else raw
            if float(raw.min()) < 0:  # the library would let negative values through
                raise UnweaveError(
                    f"{checkpoint.called}: expected thresholds of 0 or more, found {float(raw.min()):.3g}"
                )
        parts = Parts(
            activation,
            tensors.read("W_enc", n_features, d_in),
            tensors.read("W_dec", n_features, d_out),
            b_enc=tensors.read("b_enc", n_features),
            b_dec=tensors.read("b_dec", d_out),
            threshold=threshold,
            options={"k": _k(tensors, config, k)} if activation == "topk" else {},
        )
        return with_skip(parts, tensors.read("W_skip", d_out, d_in).T) if "W_skip" in tensors else parts

    def named(self, repository: str, file: str) -> Entry | None:
        match = _NAME.fullmatch(file)
        if not match:
            return None
        return Entry(self.name, repository, file, target_site=f"layers.{match[1]}.mlp", layer=int(match[1]))

    def _open(self, checkpoint: Checkpoint) -> tuple[Tensors, Settings]:
        name = next(iter(_layers(checkpoint)), checkpoint.names[0])
        config = checkpoint.settings("config.yaml") if checkpoint.beside("config.yaml") else Settings({}, "config.yaml")
        return checkpoint.tensors(name), config

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        p = plain(dictionary, self.title, "relu", "jumprelu", "skip")
        b_enc = p.encoder_bias(False, self.title)
        tensors = {"W_enc": p.W_enc, "W_dec": p.W_dec, "b_enc": b_enc, "b_dec": p.b_dec}
        if p.threshold is not None:
            tensors[_THRESHOLD] = p.threshold
        if p.W_skip is not None:
            tensors["W_skip"] = p.W_skip.T
        layer = re.search(r"layers\.(\d+)", facts.target_site or facts.site or "")
        if layer is None:
            raise UnweaveError(
                f"{self.title} names its files by layer, and nobody says of which this dictionary is: say it, "
                "with site= (--site layers.12) or target_site= (--target-site layers.12.mlp)"
            )
        name = f"layer_{layer[1]}.safetensors"
        read = in_a_layer(facts.hook) or in_a_layer(hook_of_site(facts.site)) or "mlp.hook_in"
        written = read if facts.target_site in (None, facts.site) else in_a_layer(hook_of_site(facts.target_site))
        config = {"model_name": facts.model, "model_kind": "transcoder_set", "feature_input_hook": read}
        config |= {"feature_output_hook": written or "mlp.hook_out", "transcoders": [name]}
        write_tensors(folder / name, tensors)
        write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))


def in_a_layer(hook: str | None) -> str | None:
    """The name of a hook (of the first, where there are several) without the number of its layer."""
    return re.sub(r"^blocks\.\d+\.", "", hook.split(",")[0]) if hook else None


def _layers(checkpoint: Checkpoint) -> list[str]:
    found = [match for name in checkpoint.names if (match := _NAME.fullmatch(name))]
    return [match[0] for match in sorted(found, key=lambda match: int(match[1]))]


def _activation(tensors: Tensors, config: Settings, k: int | None) -> str:
    declared = config.get("activation", str)
    if declared in ("topk", "relu"):
        return declared
    if k is not None:
        return "topk"
    return "jumprelu" if _THRESHOLD in tensors else "topk" if "k" in tensors else "relu"


def _k(tensors: Tensors, config: Settings, said: int | None) -> int | None:
    return said or (int(tensors.number("k")) if "k" in tensors else config.get("k", int))
