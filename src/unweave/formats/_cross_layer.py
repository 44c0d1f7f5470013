"""Cross-layer transcoders of other libraries: one matrix to read and one block of atoms to write for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unweave.dictionaries import CrossLayerTranscoder, Dictionary, build
from unweave.errors import UnweaveError


@dataclass(frozen=True)
class Layer:
    """One layer of a cross-layer transcoder; nothing is subtracted from what it reads.

    Attributes:
        W_enc: ``(F, d)``. b_enc: ``(F,)``. b_dec: ``(d,)``. threshold: ``(F,)``, None for ReLU.
        W_dec: ``(F, n, d)``, what its features write into this layer and the ``n - 1`` after it.
    """

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec: Tensor
    threshold: Tensor | None = None


@torch.no_grad()
def cross_layer(layers: Sequence[Layer], called: str) -> Dictionary:
    """The dictionary of all of its layers, whose rows hold the layers side by side.

    Raises:
        UnweaveError: when layers do not fit each other, or a threshold is negative.
    """
    n, (per, d), d_out = len(layers), layers[0].W_enc.shape, layers[0].W_dec.shape[2]
    jumps = layers[0].threshold is not None
    for i, layer in enumerate(layers):
        expected, found = (per, n - i, d_out), tuple(layer.W_dec.shape)
        if layer.W_enc.shape != (per, d) or found != expected or (layer.threshold is not None) != jumps:
            raise UnweaveError(
                f"{called}: expected layer {i} of {n} to read {(per, d)} and write {expected} as layer 0 does, found "
                f"{tuple(layer.W_enc.shape)} and {found}; is a file of a layer missing?"
            )
        if layer.threshold is None:
            continue
        if layer.threshold.shape != (per,):
            raise UnweaveError(f"{called}: expected {per} thresholds in layer {i}, found {layer.threshold.numel()}")
        if float(layer.threshold.min()) < 0:  # the library would let negative values through
            raise UnweaveError(f"{called}: expected thresholds of 0 or more, found {float(layer.threshold.min()):.3g}")
    options = {"activation": "jumprelu", "k": min(32, n * per)} if jumps else {"activation": "relu"}
    dictionary = build("clt", n * d, n * per, n * d_out, n_parts=n, **options)
    state = dictionary.state_dict()
    for i, layer in enumerate(layers):
        state[f"W_dec.{i}"] = layer.W_dec.flatten(1)
    for name in ("W_enc", "b_enc", "b_dec"):
        state[name] = torch.cat([getattr(layer, name) for layer in layers])
    if jumps:
        thresholds = torch.cat([layer.threshold for layer in layers if layer.threshold is not None])
        state["log_threshold"] = thresholds.clamp_min(torch.finfo(torch.float32).tiny).log()
    dictionary.load_state_dict(state)
    return dictionary.eval()


@torch.no_grad()
def layers_of(dictionary: Dictionary, title: str) -> list[Layer]:
    """A cross-layer transcoder by its layers.

    Raises:
        UnweaveError: when it is none, or keeps the k largest, which no other library's does.
    """
    if not isinstance(dictionary, CrossLayerTranscoder):
        raise UnweaveError(f"{title} holds cross-layer transcoders, this is a {dictionary.name!r} dictionary")
    if dictionary.config.activation == "topk":
        raise UnweaveError(f"{title} cannot express the activation 'topk' of this dictionary; it has relu and jumprelu")
    clt: Any = dictionary
    clt.complete()
    n, jumps = clt.n_parts, clt.config.activation == "jumprelu"
    W_enc, b_enc, b_dec = (getattr(clt, name).float().cpu().chunk(n) for name in ("W_enc", "b_enc", "b_dec"))
    thresholds = clt.log_threshold.exp().float().cpu().chunk(n) if jumps else [None] * n
    return [
        Layer(W_enc[i], b_enc[i], b_dec[i], W_dec.float().cpu().unflatten(1, (n - i, -1)), thresholds[i])
        for i, W_dec in enumerate(clt.W_dec)
    ]
