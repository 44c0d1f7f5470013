"""Llama Scope: version 1 (``hyperparams.json``, ``checkpoints/final.safetensors``) and the R1-Distill release."""

from __future__ import annotations

import re
from typing import ClassVar

from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts, site_of_hook
from unweave.formats._fold import Parts
from unweave.formats.catalogue import Entry
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, register

_BASE, _DISTILLED = "meta-llama/Llama-3.1-8B", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
_D_MODEL = 4096  # of Llama 3.1 8B; names give the width as a multiple of it
_SITES = {"R": "layers.{}", "M": "layers.{}.mlp", "A": "layers.{}.attn"}
_KEYS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}


@register("llama-scope")
class LlamaScope(Format):
    """``encoder.weight (F, d)``, ``decoder.weight (d, F)``, one threshold for all features.

    The weights expect rows times ``sqrt(d) / average norm`` and put out rows scaled likewise. The threshold is meant
    for rows that are *not* scaled (the authors' correction, SAELens issues 482 and 483).
    """

    title = "Llama Scope"
    repositories: ClassVar[dict[str, str]] = dict.fromkeys(
        (f"fnlp/Llama3_1-8B-Base-LX{part}-{times}x" for part in _SITES for times in (8, 32)), _BASE
    )
    _WEIGHTS = "final.safetensors"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.95 if checkpoint.find("hyperparams.json") and self._inner(checkpoint) else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors = checkpoint.settings("hyperparams.json"), self._open(checkpoint)
        activation = config.get("act_fn", str, "jumprelu").lower()
        missing = None
        if activation not in ("jumprelu", "relu"):
            missing = f"Llama Scope with the activation {activation!r} is not known"
        elif config.get("use_glu_encoder", bool, False):
            missing = "its encoder has a second matrix (GLU), which unweave has no architecture for"
        return _facts(self.name, tensors, config, missing, _BASE)

    def parts(self, checkpoint: Checkpoint) -> Parts:
        config, tensors = checkpoint.settings("hyperparams.json"), self._open(checkpoint)
        norms = config.section("dataset_average_activation_norm")
        d = tensors.shape("encoder.weight", 2)[1]
        return _parts(
            tensors,
            config.need("jump_relu_threshold", float),
            d**0.5 / norms.need("in", float),
            d**0.5 / norms.need("out", float),
            raw_threshold=True,
        )

    def named(self, repository: str, file: str) -> Entry | None:
        match = re.fullmatch(rf"(Llama3_1-8B-Base-L(\d+)([RMA])-(\d+)x)/checkpoints/{self._WEIGHTS}", file)
        if not match:
            return None
        place, layer, part, times = match.groups()
        facts = {"site": _SITES[part].format(layer), "layer": int(layer), "width": int(times) * _D_MODEL}
        return Entry(self.name, repository, place, name=place, **facts)

    def _inner(self, checkpoint: Checkpoint) -> Checkpoint | None:
        folder = checkpoint.folder / "checkpoints"
        return checkpoint.at(folder) if (folder / self._WEIGHTS).is_file() else None

    def _open(self, checkpoint: Checkpoint) -> Tensors:
        inner = self._inner(checkpoint)
        if inner is None:
            raise UnweaveError(f"{checkpoint.called}: expected checkpoints/{self._WEIGHTS}")
        return inner.tensors(self._WEIGHTS)


@register("llama-scope-r1")
class LlamaScopeR1(Format):
    """``config.json`` and ``sae_weights.safetensors`` with ``log_jumprelu_threshold``, meant for scaled rows.

    The average norm that rows are scaled by is not in the files: the user has to give it.
    """

    title = "Llama Scope R1-Distill"
    repositories: ClassVar[dict[str, str]] = {"fnlp/Llama-Scope-R1-Distill": _DISTILLED}
    options: ClassVar[dict[str, str]] = {
        "norm": "the average norm of the activations, by which rows are scaled to sqrt(d)"
    }

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = checkpoint.find("sae_weights.safetensors")
        return 0.9 if checkpoint.keys(name) >= {*_KEYS, "log_jumprelu_threshold"} else None

    def inspect(self, checkpoint: Checkpoint, norm: float | None = None) -> Facts:
        config, tensors = self._open(checkpoint)
        missing = None if norm is not None else "the average norm of its activations is not in its files: give norm="
        return _facts(self.name, tensors, config, missing, _DISTILLED)

    def parts(self, checkpoint: Checkpoint, norm: float | None = None) -> Parts:
        _, tensors = self._open(checkpoint)
        n_features, d = tensors.shape("encoder.weight", 2)
        scale = d**0.5 / float(norm or 0.0) if norm else 0.0
        return _parts(tensors, tensors.read("log_jumprelu_threshold", n_features).exp(), scale, scale)

    def named(self, repository: str, file: str) -> Entry | None:
        match = re.fullmatch(r"([\w-]+/L(\d+)R)/sae_weights\.safetensors", file)
        if not match:
            return None
        return Entry(self.name, repository, match[1], site=f"layers.{match[2]}", layer=int(match[2]))

    def _open(self, checkpoint: Checkpoint) -> tuple[Settings, Tensors]:
        found = checkpoint.beside("config.json")
        config = checkpoint.settings("config.json") if found else Settings({}, "config.json")
        return config, checkpoint.tensors("sae_weights.safetensors")


def _facts(format: str, tensors: Tensors, config: Settings, missing: str | None, model: str) -> Facts:
    n_features, d = tensors.shape("encoder.weight", 2)
    hook, target = config.get("hook_point_in", str), config.get("hook_point_out", str)
    return Facts(
        format,
        "jumprelu",
        d_in=d,
        d_out=d,
        n_features=n_features,
        dtype=tensors.info["encoder.weight"].dtype,
        model=model,
        site=site_of_hook(hook),
        target_site=site_of_hook(target) if target != hook else None,
        hook=hook,
        missing=missing,
    )


def _parts(tensors: Tensors, threshold, into: float, out: float, raw_threshold: bool = False) -> Parts:
    n_features, d = tensors.shape("encoder.weight", 2)
    return Parts(
        "jumprelu",
        tensors.read("encoder.weight", n_features, d),
        tensors.read("decoder.weight", d, n_features).T,
        b_enc=tensors.read("encoder.bias", n_features),
        b_dec=tensors.read("decoder.bias", d),
        threshold=threshold,
        in_scale=into,
        out_scale=out,
        raw_threshold=raw_threshold,
    )
