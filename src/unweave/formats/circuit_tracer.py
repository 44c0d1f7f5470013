"""circuit-tracer's transcoders, one layer a file: ``layer_{i}.safetensors`` and ``config.yaml``."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import write_tensors, write_text
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts
from unweave.formats._plain import plain
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, lacking, register

_KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_THRESHOLD = "activation_function.threshold"
_NAME = re.compile(r"layer_(\d+)\.safetensors")


@register("circuit-tracer")
class CircuitTracer(Format):
    """``W_enc (F, d)``, ``W_dec (F, d_out)``, biases, a threshold for JumpReLU, else ReLU; nothing is subtracted."""

    title = "circuit-tracer"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = checkpoint.weights(".safetensors")
        if not (name and _NAME.fullmatch(name) and checkpoint.keys(name) >= _KEYS):
            return None
        info = checkpoint.tensors(name).info
        return 0.85 if info["W_enc"].shape[:1] == info["b_enc"].shape else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        tensors, config = self._open(checkpoint)
        (n_features, d_in), d_out = tensors.shape("W_enc", 2), tensors.shape("W_dec", 2)[1]
        layer = _NAME.fullmatch(checkpoint.weights(".safetensors") or "")
        missing = None
        if "W_skip" in tensors:
            needed = "skip_transcoder with thresholds" if _THRESHOLD in tensors else "skip_transcoder"
            missing = lacking(needed, "a transcoder with a skip connection")
        return Facts(
            self.name,
            "jumprelu" if _THRESHOLD in tensors else "relu",
            d_in,
            d_out,
            n_features,
            dtype=tensors.info["W_enc"].dtype,
            model=config.get("model_name", str),
            target_site=f"layers.{layer[1]}.mlp" if layer else None,
            hook=config.get("feature_input_hook", str),
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint) -> Parts:
        tensors, _ = self._open(checkpoint)
        (n_features, d_in), d_out = tensors.shape("W_enc", 2), tensors.shape("W_dec", 2)[1]
        threshold = None
        if _THRESHOLD in tensors:
            raw = tensors[_THRESHOLD].flatten()
            threshold = tensors.number(_THRESHOLD) if len(raw) == 1 else raw
            if float(raw.min()) < 0:  # the library would let negative values through
                raise UnweaveError(
                    f"{checkpoint.called}: expected thresholds of 0 or more, found {float(raw.min()):.3g}"
                )
        return Parts(
            "relu" if threshold is None else "jumprelu",
            tensors.read("W_enc", n_features, d_in),
            tensors.read("W_dec", n_features, d_out),
            b_enc=tensors.read("b_enc", n_features),
            b_dec=tensors.read("b_dec", d_out),
            threshold=threshold,
        )

    def _open(self, checkpoint: Checkpoint) -> tuple[Tensors, Settings]:
        name = checkpoint.weights(".safetensors") or checkpoint.names[0]
        config = checkpoint.settings("config.yaml") if checkpoint.beside("config.yaml") else Settings({}, "config.yaml")
        return checkpoint.tensors(name), config

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        p = plain(dictionary, self.title, "relu", "jumprelu")
        b_enc = p.encoder_bias(False, self.title)
        tensors = {"W_enc": p.W_enc, "W_dec": p.W_dec, "b_enc": b_enc, "b_dec": p.b_dec}
        if p.threshold is not None:
            tensors[_THRESHOLD] = p.threshold
        layer = re.search(r"layers\.(\d+)", facts.target_site or facts.site or "")
        name = f"layer_{layer[1] if layer else 0}.safetensors"
        config = {
            "model_name": facts.model,
            "model_kind": "transcoder_set",
            "feature_input_hook": facts.hook or "mlp.hook_in",
        }
        config |= {"feature_output_hook": "mlp.hook_out", "transcoders": [name]}
        write_tensors(folder / name, tensors)
        write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
