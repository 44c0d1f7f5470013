"""Releases that are one torch file a layer and nothing else: Goodfire, DeepSeek-R1 (qresearch), Qwen-Scope, hook_z."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts, site_of_hook
from unweave.formats._fold import Parts
from unweave.formats.catalogue import Entry
from unweave.formats.containers import Tensors
from unweave.formats.registry import Format, register

_SUFFIXES = (".pt", ".pth")
_GOODFIRE = {
    "Llama-3.3-70B-Instruct-SAE-l50": ("meta-llama/Llama-3.3-70B-Instruct", 50),
    "Llama-3.1-8B-Instruct-SAE-l19": ("meta-llama/Llama-3.1-8B-Instruct", 19),
}
_DEEPSEEK = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
_QWEN_SCOPE = re.compile(r"SAE-Res-(.+)-W(\d+)K-L0_(\d+)")
_QWEN_SCOPES = [
    f"{kind}-L0_{k}"
    for kind in ("3-1.7B-Base-W32K", "3-8B-Base-W64K", "3.5-2B-Base-W32K", "3.5-9B-Base-W64K", "3.5-27B-W80K")
    for k in (50, 100)
]
_QWEN_SCOPES += [f"{size}-A3B-Base-W{w}" for size in ("3-30B", "3.5-35B") for w in ("32K-L0_50", "128K-L0_100")]


def _open(checkpoint: Checkpoint) -> Tensors:
    return checkpoint.tensors(checkpoint.weights(*_SUFFIXES) or checkpoint.names[0])


def _keys(checkpoint: Checkpoint) -> frozenset[str]:
    return checkpoint.keys(checkpoint.weights(*_SUFFIXES))


class _ReLUPair(Format):
    """Two ``nn.Linear`` with biases and a ReLU between them; nothing is subtracted."""

    encoder: str
    decoder: str

    def parts(self, checkpoint: Checkpoint) -> Parts:
        tensors = _open(checkpoint)
        n_features, d = tensors.shape(f"{self.encoder}.weight", 2)
        return Parts(
            "relu",
            tensors.read(f"{self.encoder}.weight", n_features, d),
            tensors.read(f"{self.decoder}.weight", d, n_features).T,
            b_enc=tensors.read(f"{self.encoder}.bias", n_features),
            b_dec=tensors.read(f"{self.decoder}.bias", d),
        )

    def facts(self, checkpoint: Checkpoint, model: str | None, layer: int | None) -> Facts:
        tensors = _open(checkpoint)
        n_features, d = tensors.shape(f"{self.encoder}.weight", 2)
        dtype, site = tensors.info[f"{self.encoder}.weight"].dtype, None if layer is None else f"layers.{layer}"
        return Facts(self.name, "relu", d, d, n_features, dtype=dtype, model=model, site=site)

    def named(self, repository: str, file: str) -> Entry | None:
        match = re.fullmatch(r"([\w.-]+-SAE-l(\d+))\.pth?", file)
        if not match:
            return None
        return Entry(self.name, repository, file, match[1], site=f"layers.{match[2]}", layer=int(match[2]))


@register("goodfire")
class Goodfire(_ReLUPair):
    """``encoder_linear``, ``decoder_linear``."""

    title, encoder, decoder = "Goodfire", "encoder_linear", "decoder_linear"
    repositories: ClassVar[dict[str, str]] = {f"Goodfire/{stem}": model for stem, (model, _) in _GOODFIRE.items()}

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.9 if _keys(checkpoint) >= {"encoder_linear.weight", "decoder_linear.weight"} else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        model, layer = _GOODFIRE.get(Path(checkpoint.called).stem, (None, None))
        return self.facts(checkpoint, model, layer)


@register("deepseek-r1")
class DeepSeekR1(_ReLUPair):
    """``encoder``, ``decoder``, in bfloat16; the layer stands in the file's name (``...-l19.pt``)."""

    title, encoder, decoder = "DeepSeek-R1 (qresearch)", "encoder", "decoder"
    repositories: ClassVar[dict[str, str]] = {"qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19": _DEEPSEEK}

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = checkpoint.weights(*_SUFFIXES) or ""
        keys = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
        return 0.5 if "DeepSeek-R1" in name and _keys(checkpoint) == keys else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        layer = re.search(r"l(\d+)", Path(checkpoint.called).stem.lower())
        return self.facts(checkpoint, _DEEPSEEK, int(layer[1]) if layer else None)


@register("qwen-scope")
class QwenScope(Format):
    """``W_enc (F, d)``, ``W_dec (d, F)``, both transposed as against SAELens; TopK, k in the repository's name only.

    ``SAE-Res-{model}-W{N}K-L0_{k}/layer{n}.sae.pt`` reads the stream after layer n.
    """

    title = "Qwen-Scope"
    options: ClassVar[dict[str, str]] = {"k": "features a row: it stands in the repository's name only (L0_50)"}
    repositories: ClassVar[dict[str, None]] = dict.fromkeys(f"Qwen/SAE-Res-Qwen{kind}" for kind in _QWEN_SCOPES)

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = checkpoint.weights(*_SUFFIXES)
        if checkpoint.keys(name) != {"W_enc", "W_dec", "b_enc", "b_dec"} or name is None:
            return None
        info = checkpoint.tensors(name).info
        fits = info["W_enc"].shape == info["W_dec"].shape[::-1] and info["W_enc"].shape[:1] == info["b_enc"].shape
        return 0.8 if fits and info["W_enc"].shape[1:] == info["b_dec"].shape else None

    def inspect(self, checkpoint: Checkpoint, k: int | None = None) -> Facts:
        tensors = _open(checkpoint)
        n_features, d = tensors.shape("W_enc", 2)
        repository = _QWEN_SCOPE.search(checkpoint.called)
        layer = re.search(r"layer(\d+)\.sae\.pt", checkpoint.names[0])
        found = k or (int(repository[3]) if repository else None)
        return Facts(
            self.name,
            "topk",
            d,
            d,
            n_features,
            found,
            dtype=tensors.info["W_enc"].dtype,
            model=f"Qwen/{repository[1]}" if repository else None,
            site=f"layers.{layer[1]}" if layer else None,
            missing=None if found else "k is not in the file: give k= (the number behind L0_ in the repository's name)",
        )

    def parts(self, checkpoint: Checkpoint, k: int | None = None) -> Parts:
        tensors = _open(checkpoint)
        n_features, d = tensors.shape("W_enc", 2)
        return Parts(
            "topk",
            tensors.read("W_enc", n_features, d),
            tensors.read("W_dec", d, n_features).T,
            b_enc=tensors.read("b_enc", n_features),
            b_dec=tensors.read("b_dec", d),
            options={"k": self.inspect(checkpoint, k).k},
        )

    def named(self, repository: str, file: str) -> Entry | None:
        said, match = _QWEN_SCOPE.search(repository), re.fullmatch(r"layer(\d+)\.sae\.pt", file)
        if not (said and match):
            return None
        k, layer = int(said[3]), int(match[1])
        facts = {"model": f"Qwen/{said[1]}", "site": f"layers.{layer}", "layer": layer, "width": int(said[2]) * 1024}
        return Entry(self.name, repository, file, k=k, options={"k": k}, **facts)


@register("hook-z")
class HookZ(Format):
    """Connor and Rob's attention SAEs: ``NAME.pt`` beside ``NAME_cfg.json``; ReLU on ``x - b_dec``, all heads a row."""

    title = "connor_rob hook_z"
    repositories: ClassVar[dict[str, str]] = {"ckkissane/attn-saes-gpt2-small-all-layers": "openai-community/gpt2"}

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = checkpoint.weights(*_SUFFIXES)
        found = name is not None and checkpoint.keys(name) >= {"W_enc", "W_dec", "b_enc", "b_dec"}
        return 0.9 if found and name and "act_size" in checkpoint.quiet_settings(self._config(name)) else None

    def _config(self, name: str) -> str:
        return f"{Path(name).stem}_cfg.json"

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        tensors, name = _open(checkpoint), checkpoint.weights(*_SUFFIXES) or checkpoint.names[0]
        config = checkpoint.settings(self._config(name))
        d, n_features = tensors.shape("W_enc", 2)
        if (config.size("act_size"), config.size("dict_size")) != (d, n_features):
            raise UnweaveError(f"{checkpoint.called}: its settings do not fit its weights ({d}, {n_features})")
        hook, model = config.get("act_name", str), config.get("model_name", str)
        dtype, site = tensors.info["W_enc"].dtype, site_of_hook(hook)
        return Facts(self.name, "relu", d, d, n_features, dtype=dtype, model=model, site=site, hook=hook)

    def parts(self, checkpoint: Checkpoint) -> Parts:
        tensors = _open(checkpoint)
        d, n_features = tensors.shape("W_enc", 2)
        bias = tensors.read("b_dec", d)
        W_enc, W_dec = tensors.read("W_enc", d, n_features).T, tensors.read("W_dec", n_features, d)
        return Parts("relu", W_enc, W_dec, tensors.read("b_enc", n_features), bias, bias)

    def named(self, repository: str, file: str) -> Entry | None:
        match = re.fullmatch(r"gpt2-small_L(\d+)_Hcat_z_\S*_ds(\d+)_\S*\.pt", file)
        if not match:
            return None
        layer = int(match[1])
        facts = {"site": f"layers.{layer}.attn.heads", "layer": layer, "width": int(match[2])}
        return Entry(self.name, repository, file, **facts)
