"""Cross-layer transcoders of other libraries, and atoms of one part among several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unweave.dictionaries import CrossLayerTranscoder, Dictionary, SkipCrossLayerTranscoder, build
from unweave.errors import UnweaveError


@dataclass(frozen=True)
class Layer:
    """One layer of a cross-layer transcoder; nothing is subtracted from what it reads.

    Attributes:
        W_enc: ``(F, d)``. b_enc: ``(F,)``. b_dec: ``(d,)``. threshold: ``(F,)``, None for ReLU and TopK.
        W_dec: ``(F, n, d)``, what its features write into this layer and the ``n - 1`` after it.
        W_skip: ``(d, d)``, from what it reads to what is added to its output; None if there is none.
    """

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec: Tensor
    threshold: Tensor | None = None
    W_skip: Tensor | None = None


@torch.no_grad()
def cross_layer(
    layers: Sequence[Layer], called: str, k: int | None = None, rms: Sequence[float] | None = None
) -> Dictionary:
    """The dictionary of all of its layers, whose rows hold the layers side by side.

    Args:
        k: of TopK, features of each layer. rms: in what unit each layer counts what is written into it, for TopK.

    Raises:
        UnweaveError: when layers do not fit each other, or a threshold is negative.
    """
    n, (per, d), d_out = len(layers), layers[0].W_enc.shape, layers[0].W_dec.shape[2]
    jumps, skips = layers[0].threshold is not None, layers[0].W_skip is not None
    for i, layer in enumerate(layers):
        expected, found = (per, n - i, d_out), tuple(layer.W_dec.shape)
        alike = (layer.threshold is not None, layer.W_skip is not None) == (jumps, skips)
        if layer.W_enc.shape != (per, d) or found != expected or not alike:
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
    options: dict[str, Any] = {"activation": "relu"} if k is None else {"activation": "topk", "k": n * min(k, per)}
    if jumps:
        options = {"activation": "jumprelu", "k": min(32, n * per)}
    dictionary = build("skip_clt" if skips else "clt", n * d, n * per, n * d_out, n_parts=n, **options)
    state = dictionary.state_dict()
    for i, layer in enumerate(layers):
        state[f"W_dec.{i}"] = layer.W_dec.flatten(1)
    for name in ("W_enc", "b_enc", "b_dec"):
        state[name] = torch.cat([getattr(layer, name) for layer in layers])
    if skips:
        state["W_skip"] = torch.stack([layer.W_skip for layer in layers if layer.W_skip is not None])
    if rms is not None:
        state["part_rms"] = torch.tensor(rms)
    if jumps:
        thresholds = torch.cat([layer.threshold for layer in layers if layer.threshold is not None])
        state["log_threshold"] = thresholds.clamp_min(torch.finfo(torch.float32).tiny).log()
    dictionary.load_state_dict(state)
    return dictionary.eval()


@torch.no_grad()
def layers_of(dictionary: Dictionary, title: str, *can: str) -> list[Layer]:
    """A cross-layer transcoder by its layers.

    Args:
        can: the activations that the target has.

    Raises:
        UnweaveError: when it is none, has an activation that is none of these, or a skip.
    """
    if not isinstance(dictionary, CrossLayerTranscoder):
        raise UnweaveError(f"{title} holds cross-layer transcoders, this is a {dictionary.name!r} dictionary")
    if isinstance(dictionary, SkipCrossLayerTranscoder):
        raise UnweaveError(f"{title} cannot express the skip of this {dictionary.name!r} dictionary")
    if dictionary.config.activation not in can:
        raise UnweaveError(
            f"{title} cannot express the activation {dictionary.config.activation!r} of this dictionary; it has "
            + " and ".join(can)
        )
    clt: Any = dictionary
    clt.complete()
    n, jumps = clt.n_parts, clt.config.activation == "jumprelu"
    W_enc, b_enc, b_dec = (getattr(clt, name).float().cpu().chunk(n) for name in ("W_enc", "b_enc", "b_dec"))
    thresholds = clt.log_threshold.exp().float().cpu().chunk(n) if jumps else [None] * n
    return [
        Layer(W_enc[i], b_enc[i], b_dec[i], W_dec.float().cpu().unflatten(1, (n - i, -1)), thresholds[i])
        for i, W_dec in enumerate(clt.W_dec)
    ]


def one_part(atoms: Tensor, part: int, n: int) -> Tensor:
    """``(F, n d)``: atoms ``(F, d)`` that write into one of n parts, and 0 into the others."""
    whole = atoms.new_zeros(len(atoms), n, atoms.shape[1])
    whole[:, part] = atoms
    return whole.flatten(1)
