"""The fold: scales, decoder norms, biases and thresholds of any checkpoint moved into the weights of a dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.dictionaries import Dictionary, build, get
from unweave.errors import UnweaveError

Norms = Literal["apart", "in_codes", "in_threshold"]


@dataclass(frozen=True)
class Parts:
    """A checkpoint in one layout, with what its library does around the weights.

    The library computes, for a raw row ``x`` and atoms of norm ``n``::

        x' = in_scale x;  u = (x' - b_pre) W_enc^T + b_enc;  z = act(u);  y = (z W_dec + b_dec + x' W_skip) / out_scale

    Attributes:
        architecture: of unweave's registry. options: of its config.
        W_enc: ``(F, d_in)``. W_dec: ``(F, d_out)``. b_enc: ``(F,)``. b_dec: ``(d_out,)``. b_pre: ``(d_in,)``. A bias
            may be None.
        threshold: a number or ``(F,)``; what u has to exceed. raw_threshold: whether it is meant for rows that are not
            scaled (Llama Scope v1), and so has to be scaled like them.
        norms: what decoder norms have to do with ``act``. "apart": nothing. "in_codes": the library acts on ``u n`` and
            that is its code, decoded with ``W_dec / n``. "in_threshold": it acts on ``u n`` but the code is u.
        log_magnitude, b_mag: ``(F,)``, of gated ones: ``z = 1[u > 0] ReLU(exp(log_magnitude) (u - b_enc) + b_mag)``.
        W_gate, b_gate: ``(F, d_in)`` and ``(F,)``, of GLU encoders: u is multiplied by
            ``sigmoid((x' - b_pre) W_gate^T + b_gate)``.
        W_skip: ``(d_in, d_out)``, of those with a skip.
    """

    architecture: str
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor | None = None
    b_dec: Tensor | None = None
    b_pre: Tensor | None = None
    threshold: Tensor | float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    in_scale: float = 1.0
    out_scale: float = 1.0
    raw_threshold: bool = False
    norms: Norms = "apart"
    log_magnitude: Tensor | None = None
    b_mag: Tensor | None = None
    W_gate: Tensor | None = None
    b_gate: Tensor | None = None
    W_skip: Tensor | None = None


# An architecture by its activation, and the one that has a skip besides: its name and its options.
_SKIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("skip_transcoder", {"activation": "relu"}),
    "topk": ("skip_transcoder", {}),
    "jumprelu": ("jumprelu_skip_transcoder", {}),
    "abs_topk": ("abs_topk_skip_transcoder", {}),
    "group_max": ("group_max_skip_transcoder", {}),
}


def skip_name(architecture: str) -> str | None:
    """The architecture with a skip beside the code; None if there is none."""
    return _SKIPS[architecture][0] if architecture in _SKIPS else None


def with_skip(parts: Parts, W_skip: Tensor) -> Parts:
    """The same with ``x' W_skip`` added to its output."""
    name, options = _SKIPS[parts.architecture]
    return replace(parts, architecture=name, options={**parts.options, **options}, W_skip=W_skip)


@torch.no_grad()
def fold(parts: Parts) -> Dictionary:
    """A dictionary for raw rows that computes what the library computes with its scales around it.

    Codes come out in the units of the output (divided by ``out_scale``), as everywhere in unweave.

    Raises:
        UnweaveError: when shapes do not fit, or a scale is not a positive number.
    """
    W_enc, W_dec = parts.W_enc.float(), parts.W_dec.float()
    (n_features, d_in), d_out = W_enc.shape, W_dec.shape[1]
    if len(W_dec) != n_features:
        raise UnweaveError(f"expected as many atoms as encoder rows, found {len(W_dec):,} and {n_features:,}")
    b_enc = _bias(parts.b_enc, n_features, "b_enc")
    b_dec = _bias(parts.b_dec, d_out, "b_dec")
    b_pre = _bias(parts.b_pre, d_in, "b_pre")
    b_mag = _bias(parts.b_mag, n_features, "b_mag")
    b_gate = _bias(parts.b_gate, n_features, "b_gate")
    gain = _bias(parts.log_magnitude, n_features, "log_magnitude").exp()
    into, out = float(parts.in_scale), float(parts.out_scale)
    for name, scale in (("input", into), ("output", out)):
        if not 0 < scale < float("inf"):
            raise UnweaveError(f"expected the {name} scale to be a positive number, found {scale}")
    threshold = None if parts.threshold is None else torch.as_tensor(parts.threshold, dtype=torch.float64)
    if threshold is not None and parts.raw_threshold:
        threshold = threshold * into

    if parts.norms == "in_codes":
        norms = W_dec.norm(dim=1).clamp_min(1e-30)
        W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
        b_mag = b_mag * norms
    elif parts.norms == "in_threshold" and threshold is not None:
        threshold = threshold / W_dec.norm(dim=1).clamp_min(1e-30)

    # z = u / out, with u of x' = into x. What is subtracted from a raw row is b_pre / into.
    # Subtracting b_dec is what dictionaries do; any other bias goes into b_enc.
    subtract = d_in == d_out and parts.b_pre is not None and torch.equal(b_pre / into, b_dec / out)
    if not subtract:
        shift = _product(W_enc, b_pre)
        b_enc, b_mag = b_enc - shift, b_mag - gain * shift
        b_gate = b_gate if parts.W_gate is None else b_gate - _product(parts.W_gate.float(), b_pre)
    W_enc = W_enc if into == out else W_enc * (into / out)
    b_enc, b_dec, b_mag = b_enc / out, b_dec / out, b_mag / out
    threshold = None if threshold is None else threshold / out

    kind = get(parts.architecture)
    # JumpReLU's expected number of features is a setting of its training; it must only fit.
    own = {"target_l0": min(32.0, n_features)} if "target_l0" in kind.Config.model_fields else {}
    options = {**own, **parts.options, "subtract_bias": subtract}
    dictionary = build(parts.architecture, d_in, n_features, d_out, **options)
    state = dictionary.state_dict()
    state.update({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec})
    skip = None if parts.W_skip is None else parts.W_skip * (into / out)
    gate = None if parts.W_gate is None else parts.W_gate * into
    gated = {"log_magnitude": gain.log(), "b_mag": b_mag, "W_gate": gate, "b_gate": b_gate, "W_skip": skip}
    for name, value in gated.items():
        if (name in state) != (getattr(parts, name) is not None):
            raise UnweaveError(f"{parts.architecture} {'needs' if name in state else 'has no place for'} {name}")
        if name in state and value is not None:
            state[name] = value
    if threshold is not None:
        _set_threshold(state, threshold, parts.architecture)
    dictionary.load_state_dict({name: value.to(dictionary.state_dict()[name].dtype) for name, value in state.items()})
    return dictionary.eval()


def _set_threshold(state: dict[str, Tensor], threshold: Tensor, architecture: str) -> None:
    if "log_threshold" in state:
        # A threshold of 0 or less passes every positive value, as the least positive one does.
        least = torch.finfo(torch.float32).tiny
        state["log_threshold"] = threshold.clamp_min(least).log().expand_as(state["log_threshold"]).clone()
    elif "threshold" in state and threshold.numel() == 1:
        state["threshold"] = threshold.reshape(())
    else:
        raise UnweaveError(f"{architecture} has no place for {threshold.numel()} thresholds")


def _product(W: Tensor, x: Tensor) -> Tensor:
    """``W x`` in float64, without a copy of all of W in it."""
    return torch.cat([rows.double() @ x for rows in W.split(8192)])


def _bias(bias: Tensor | None, size: int, name: str) -> Tensor:
    if bias is None:
        return torch.zeros(size, dtype=torch.float64)
    if bias.shape != (size,):
        raise UnweaveError(f"expected {name} of shape ({size},), found {tuple(bias.shape)}")
    return bias.double()
