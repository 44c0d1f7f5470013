"""OpenAI's GPT-2 autoencoders (``sparse_autoencoder``): one ``.pt`` a layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts
from unweave.formats.containers import Tensors
from unweave.formats.registry import Format, register

_KEYS = {"pre_bias", "encoder.weight", "latent_bias"}
_SITES = {"resid_post_mlp": "layers.{}", "resid_delta_mlp": "layers.{}.mlp", "resid_delta_attn": "layers.{}.attn"}
_SITES |= {"resid_post_attn": None, "mlp_post_act": None}

_ARCHITECTURES = {"ReLU": "relu", "TopK": "standardised_topk"}


@register("openai")
class OpenAI(Format):
    """``pre_bias (d)``, subtracted and added back; ``encoder.weight (F, d)``, ``decoder.weight (d, F)``.

    The TopK ones standardise every row first (mean 0, deviation 1) and undo it after decoding, which their file says
    by the word ``TopK`` alone. A tied decoder has no weight of its own.
    """

    title = "OpenAI's sparse_autoencoder"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.9 if checkpoint.keys(_weights(checkpoint)) >= _KEYS else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        tensors = _open(checkpoint)
        n_features, d = tensors.shape("encoder.weight", 2)
        activation, path = _activation(tensors), Path(checkpoint.called)
        location = next((part for part in path.parts if part in _SITES), None)
        layer = re.fullmatch(r"(\d+)\.pt", path.name)
        pattern = _SITES.get(location or "")
        missing = None
        if activation == "TopK" and _k(tensors) is None:
            missing = "it is called TopK but does not say its k"
        elif activation not in ("ReLU", "TopK"):
            missing = f"the activation {activation!r} is not known"
        return Facts(
            self.name,
            _ARCHITECTURES.get(activation, activation),
            d_in=d,
            d_out=d,
            n_features=n_features,
            k=_k(tensors),
            dtype=tensors.info["encoder.weight"].dtype,
            library_class=activation,
            model="openai-community/gpt2" if location else None,
            site=pattern.format(layer[1]) if pattern and layer else None,
            hook=location,
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint) -> Parts:
        tensors = _open(checkpoint)
        n_features, d = tensors.shape("encoder.weight", 2)
        bias, W_enc = tensors.read("pre_bias", d), tensors.read("encoder.weight", n_features, d)
        W_dec = tensors.read("decoder.weight", d, n_features).T if "decoder.weight" in tensors else W_enc.clone()
        architecture = _ARCHITECTURES[_activation(tensors)]
        options = {"k": int(_k(tensors))} if "topk" in architecture else {}
        return Parts(architecture, W_enc, W_dec, tensors.read("latent_bias", n_features), bias, bias, options=options)


def _weights(checkpoint: Checkpoint) -> str | None:
    return checkpoint.weights(".pt", ".pth")


def _open(checkpoint: Checkpoint) -> Tensors:
    name = _weights(checkpoint)
    if name is None:
        raise UnweaveError(
            f"{checkpoint.called}: expected one .pt file, found {', '.join(checkpoint.names[:8]) or 'none'}"
        )
    return checkpoint.tensors(name)


def _activation(tensors: Tensors) -> str:
    named = tensors.values_beside.get("activation", "ReLU")
    return named if isinstance(named, str) else str(type(named).__name__)


def _k(tensors: Tensors) -> Any:
    if "activation_state_dict.k" in tensors:
        return tensors.number("activation_state_dict.k")
    k = tensors.values_beside.get("activation_state_dict.k")
    return k if isinstance(k, int) and k > 0 else None
