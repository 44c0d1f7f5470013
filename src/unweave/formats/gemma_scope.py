"""Gemma Scope 1 (``params.npz``) and 2 (``params.safetensors``): JumpReLU dictionaries and transcoders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import numpy as np

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import atomic_path
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._cross_layer import Layer, cross_layer
from unweave.formats._facts import Facts, site_of_module
from unweave.formats._fold import Parts, with_skip
from unweave.formats._plain import plain
from unweave.formats.catalogue import Entry
from unweave.formats.catalogue.entry import binary, number
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, register

_KEYS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
_AFFINE = "affine_skip_connection"  # (d_in, d_out), applied to the raw row
# The MLP's output is taken behind the norm that follows it; a transcoder reads what the norm before the MLP gives it.
_MLP, _BEFORE_MLP = "layers.{}.post_feedforward_layernorm", "layers.{}.pre_feedforward_layernorm"
_SITES_1 = {"res": "layers.{}", "mlp": _MLP, "att": "layers.{}.attn.heads"}
_SITES_2 = {"resid_post": "layers.{}", "attn_out": "layers.{}.attn.heads", "mlp_out": _MLP}
_REPOSITORY = re.compile(r"gemma-scope-(\w+)-(pt|it)-(res|mlp|att|transcoders)")
_PUBLISHED = {"2b-pt": (*_SITES_1, "transcoders"), "9b-pt": (*_SITES_1,), "9b-it": ("res",), "27b-pt": ("res",)}
_PLACE = re.compile(r"(?:layer_(\d+)|embedding)/width_(\w+)/average_l0_(\d+)")
_REPOSITORY_2 = re.compile(r"google/gemma-scope-2-(\w+)-(pt|it)")
_PLACE_2 = re.compile(r"(resid_post|attn_out|mlp_out|transcoder)(?:_all)?/layer_(\d+)_width_(\w+?)_l0_\w+")
_PLACE_CLT = re.compile(r"clt/width_(\w+?)_l0_\w+")


class _GemmaScope(Format):
    """``W_enc (d, F)``, ``W_dec (F, d_out)``, ``b_enc``, ``b_dec``, ``threshold (F)``; nothing is subtracted."""

    def parts(self, checkpoint: Checkpoint) -> Parts:
        tensors = _open(checkpoint)
        names = {name.lower(): name for name in tensors}
        d_in, n_features = tensors.shape(names["w_enc"], 2)
        d_out = tensors.shape(names["w_dec"], 2)[1]
        W_enc, W_dec = tensors.read(names["w_enc"], d_in, n_features).T, tensors.read(names["w_dec"], n_features, d_out)
        if "embedding" in _path(checkpoint):  # trained on sqrt(d) times smaller rows
            W_enc, W_dec = W_enc / d_in**0.5, W_dec * d_in**0.5
        parts = Parts(
            "jumprelu",
            W_enc,
            W_dec,
            b_enc=tensors.read(names["b_enc"], n_features),
            b_dec=tensors.read(names["b_dec"], d_out),
            threshold=tensors.read(names["threshold"], n_features),
        )
        return with_skip(parts, tensors.read(_AFFINE, d_in, d_out)) if _AFFINE in tensors else parts


@register("gemma-scope")
class GemmaScope(_GemmaScope):
    """The file says neither model nor site: they are read from the path, where it is still the hub's."""

    title = "Gemma Scope"
    checked = "library"
    repositories: ClassVar[dict[str, None]] = dict.fromkeys(
        f"google/gemma-scope-{kind}-{part}" for kind, parts in _PUBLISHED.items() for part in parts
    )

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = checkpoint.weights(".npz")
        return 0.9 if {key.lower() for key in checkpoint.keys(name)} >= _KEYS else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        path = _path(checkpoint)
        layer, l0 = _number(path, "layer_"), _number(path, "average_l0_")
        model, site, target_site = _of_repository("/".join(path), layer)
        return _facts(
            self.name,
            checkpoint,
            model=model,
            site=site,
            target_site=target_site,
            context={"average L0": l0, "BOS": "prepended, as the models expect"},
            notes=("reads what the second norm gives the MLP, writes what is added to the stream",)
            if target_site
            else (),
        )

    def named(self, repository: str, file: str) -> Entry | None:
        place, _, last = file.rpartition("/")
        match = _PLACE.fullmatch(place)
        if not match or last != "params.npz":
            return None
        layer = number(match[1])
        model, site, target_site = _of_repository(repository, layer)
        facts = {"model": model, "site": site, "target_site": target_site, "layer": layer}
        return Entry(self.name, repository, place, width=binary(match[2]), l0=int(match[3]), **facts)

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        p = plain(dictionary, self.title, "jumprelu")
        assert p.threshold is not None
        b_enc = p.encoder_bias(False, self.title)
        arrays = {"W_enc": p.W_enc.T, "W_dec": p.W_dec, "b_enc": b_enc, "b_dec": p.b_dec, "threshold": p.threshold}
        with atomic_path(folder / "params.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **{name: array.contiguous().numpy() for name, array in arrays.items()})


@register("gemma-scope-2")
class GemmaScope2(_GemmaScope):
    """Lower-case names, and a ``config.json`` that is missing from some repositories."""

    title = "Gemma Scope 2"
    checked = "library"
    repositories: ClassVar[dict[str, None]] = dict.fromkeys(
        f"google/gemma-scope-2-{size}-{tuned}" for size in ("270m", "1b", "4b", "12b", "27b") for tuned in ("pt", "it")
    )

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = checkpoint.weights(".safetensors")
        return 0.9 if checkpoint.keys(name) >= _KEYS else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors, missing = _settings(checkpoint), _open(checkpoint), None
        if len(tensors.info["w_dec"].shape) == 3:
            missing = "one layer of a cross-layer transcoder: name the folder that holds the folders of all layers"
        hook = config.get("hf_hook_point_in", str)
        site, target = (_site(config.get(f"hf_hook_point_{way}", str)) for way in ("in", "out"))
        return _facts(
            self.name,
            checkpoint,
            model=config.get("model_name", str),
            site=site,
            target_site=target if target != site else None,
            hook=hook,
            context={"L0": config.get("l0", object)},
            missing=missing,
        )

    def named(self, repository: str, file: str) -> Entry | None:
        """Its L0 is small, medium or big in the name; which number that is stands in its settings."""
        place, _, last = file.rpartition("/")
        match, whole, model = _PLACE_2.fullmatch(place), _PLACE_CLT.fullmatch(place), _model_2(repository)
        if whole and re.fullmatch(r"(params_)?layer_0\.safetensors", last):
            return Entry("gemma-scope-2-clt", repository, place, model=model, width=binary(whole[1]))
        if not match or last != "params.safetensors":
            return None
        layer, pattern = int(match[2]), _SITES_2.get(match[1])
        both = (pattern, None) if pattern else (_BEFORE_MLP, _MLP)
        site, target_site = (None if part is None else part.format(layer) for part in both)
        facts = {"model": model, "site": site, "target_site": target_site, "layer": layer}
        return Entry(self.name, repository, place, width=binary(match[3]), **facts)


@register("gemma-scope-2-clt")
class GemmaScope2CLT(Format):
    """One file a layer in one folder, as for its transcoders, but for ``w_dec (F, n_layers, d)``.

    Features of layer i write into the layers from i on; what is stored for those before is left out, as circuit-tracer
    does. (Its own reader stops before the last layer, which leaves that one out as well.) An affine skip goes from what
    a layer reads to what it writes.
    """

    title = "Gemma Scope 2's CLT"
    checked = "library"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        if checkpoint.file is not None:
            return None
        keys = checkpoint.keys(_layers(checkpoint).get(0))
        return 0.95 if keys >= _KEYS and len(_layers(checkpoint)) > 1 else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, layers = _settings(checkpoint), _all_layers(checkpoint)
        first = checkpoint.tensors(layers[0])
        (d, per), width = first.shape("w_enc", 2), first.shape("w_dec", 3)[2]
        skips, n = _AFFINE in first, len(layers)
        return Facts(
            self.name,
            "skip_clt" if skips else "clt",
            d_in=n * d,
            d_out=n * width,
            n_features=n * per,
            dtype=first.info["w_dec"].dtype,
            model=config.get("model_name", str),
            hook=config.get("hf_hook_point_in", str),
            context={"layers": n, "L0": config.get("l0", object)},
            notes=("rows hold the layers side by side",),
        )

    def parts(self, checkpoint: Checkpoint) -> Dictionary:
        layers = _all_layers(checkpoint)
        return cross_layer(
            [_layer(checkpoint.tensors(layers[i]), i, len(layers)) for i in sorted(layers)], checkpoint.called
        )


def _of_repository(path: str, layer: int | None) -> tuple[str | None, str | None, str | None]:
    """The model, site and target site of a dictionary of Gemma Scope 1, where its repository's name is in the path."""
    match = _REPOSITORY.search(path)
    if not match:
        return None, None, None
    model = f"google/gemma-2-{match[1]}" + ("-it" if match[2] == "it" else "")
    if layer is None:
        return model, None, None
    if match[3] == "transcoders":
        return model, _BEFORE_MLP.format(layer), _MLP.format(layer)
    return model, _SITES_1[match[3]].format(layer), None


def _model_2(repository: str) -> str | None:
    match = _REPOSITORY_2.fullmatch(repository)
    if not match:
        return None
    size, tuned = match.groups()
    return f"google/gemma-3-{size}" if (size, tuned) == ("270m", "pt") else f"google/gemma-3-{size}-{tuned}"


def _layers(checkpoint: Checkpoint) -> dict[int, str]:
    found = {name: re.search(r"layer_(\d+)", name) for name in checkpoint.names if name.endswith(".safetensors")}
    return {int(match[1]): name for name, match in found.items() if match}


def _all_layers(checkpoint: Checkpoint) -> dict[int, str]:
    layers = _layers(checkpoint)
    if not layers or sorted(layers) != list(range(len(layers))):
        raise UnweaveError(f"{checkpoint.called}: expected the layers from 0 on, found those of {sorted(layers)}")
    return layers


def _layer(tensors: Tensors, i: int, n: int) -> Layer:
    (d, per), width = tensors.shape("w_enc", 2), tensors.shape("w_dec", 3)[2]
    return Layer(
        tensors.read("w_enc", d, per).T,
        tensors.read("b_enc", per),
        tensors.read("b_dec", width),
        tensors.read("w_dec", per, n, width)[:, i:],
        tensors.read("threshold", per),
        tensors.read(_AFFINE, d, width) if _AFFINE in tensors else None,
    )


def _open(checkpoint: Checkpoint) -> Tensors:
    name = checkpoint.weights(".npz", ".safetensors") or checkpoint.names[0]
    return checkpoint.tensors(name)


def _facts(format: str, checkpoint: Checkpoint, **known) -> Facts:
    tensors = _open(checkpoint)
    names = {name.lower(): name for name in tensors}
    d_in, n_features = tensors.shape(names["w_enc"], 2)
    W_dec = tensors.info[names["w_dec"]]
    sizes = {"d_in": d_in, "d_out": W_dec.shape[-1], "n_features": n_features, "dtype": W_dec.dtype}
    name = "jumprelu_skip_transcoder" if _AFFINE in tensors else "jumprelu"
    return Facts(format, name, **sizes, **known)


def _settings(checkpoint: Checkpoint) -> Settings:
    return checkpoint.settings("config.json") if checkpoint.beside("config.json") else Settings({}, "config.json")


def _site(hook: str | None) -> str | None:
    return site_of_module((hook or "").removesuffix(".output"))


def _path(checkpoint: Checkpoint) -> tuple[str, ...]:
    return Path(checkpoint.called).parts


def _number(path: tuple[str, ...], prefix: str) -> int | None:
    found = [re.match(rf"{prefix}(\d+)", part) for part in path]
    return next((int(match[1]) for match in reversed(found) if match), None)
