"""A dictionary in the terms that other libraries have: matrices, biases, and which entries fire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.dictionaries import Dictionary
from unweave.dictionaries._linear import LinearDictionary
from unweave.dictionaries.gated import Gated
from unweave.dictionaries.glu import GLU
from unweave.dictionaries.group_max import GroupMax
from unweave.dictionaries.standardised import Standardised
from unweave.dictionaries.transcoder import Skip
from unweave.errors import UnweaveError
from unweave.kernels.select import AboveRule, TopKRule


@dataclass(frozen=True)
class Plain:
    """What a linear dictionary does in eval mode, whatever it was trained with.

    ``activation`` is "topk", "abs_topk" or "group_max" with ``k``, "relu", "jumprelu" with ``threshold (F,)``, or
    "gated" with ``log_magnitude`` and ``b_mag (F,)``; only the codes of "abs_topk" may be negative. The encoder reads
    ``x - b_dec`` where ``subtracts``; ``x W_skip`` is added to the output where there is one. ``standardise``: how rows
    are standardised first, as in :class:`unweave.dictionaries.standardised.StandardisedConfig`.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    subtracts: bool
    activation: Literal["relu", "topk", "abs_topk", "group_max", "jumprelu", "gated"]
    k: int | None = None
    threshold: Tensor | None = None
    log_magnitude: Tensor | None = None
    b_mag: Tensor | None = None
    W_skip: Tensor | None = None
    standardise: str | None = None

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def n_features(self) -> int:
        return self.W_enc.shape[0]

    def encoder_bias(self, subtracts: bool, title: str) -> Tensor:
        """``b_enc`` for a library that does (or does not) subtract ``b_dec`` from what it encodes."""
        if subtracts == self.subtracts:
            return self.b_enc
        if self.d_in != self.d_out:
            raise UnweaveError(
                f"{title} subtracts b_dec from the input, so d_in must equal d_out, found {self.d_in} and {self.d_out}"
            )
        shift = (self.W_enc.double() @ self.b_dec.double()).float()
        return self.b_enc + shift if subtracts else self.b_enc - shift

    def magnitude_bias(self, subtracts: bool) -> Tensor:
        """``b_mag`` likewise; ``encoder_bias`` first sees to it that this can be done."""
        assert self.b_mag is not None
        assert self.log_magnitude is not None
        if subtracts == self.subtracts:
            return self.b_mag
        shift = self.log_magnitude.double().exp() * (self.W_enc.double() @ self.b_dec.double())
        return (self.b_mag + (shift if subtracts else -shift)).float()


@torch.no_grad()
def plain(dictionary: Dictionary, title: str, *can: str) -> Plain:
    """The dictionary as a :class:`Plain`.

    Args:
        can: the activations that the target has, and "skip" and "standardise" if it has that.

    Raises:
        UnweaveError: when the dictionary is not linear, or its activation is none of these.
    """
    if not isinstance(dictionary, LinearDictionary) or isinstance(dictionary, GLU):
        raise UnweaveError(f"{title} cannot express a {dictionary.name!r} dictionary: its encoder is not linear")
    rule = dictionary.eval().rule()
    k, threshold = None, None
    more: dict[str, Any] = {}
    if isinstance(dictionary, Gated):
        activation, more = "gated", {"log_magnitude": dictionary.log_magnitude, "b_mag": dictionary.b_mag}
    elif isinstance(dictionary, GroupMax):
        activation, k = "group_max", dictionary.config.k
    elif isinstance(rule, TopKRule):
        activation, k = ("abs_topk" if rule.signed else "topk"), rule.k
    elif isinstance(rule, AboveRule):
        bound = torch.as_tensor(rule.threshold, dtype=torch.float32).detach().cpu()
        activation = "relu" if bound.ndim == 0 and float(bound) == 0 else "jumprelu"
        threshold = bound.expand(dictionary.n_features).clone() if activation == "jumprelu" else None
        if "jumprelu" not in can and threshold is not None and float(threshold.max()) < 1e-30:
            activation, threshold = "relu", None
    else:
        raise UnweaveError(f"{title} cannot express a {dictionary.name!r} dictionary: its rows depend on each other")
    if activation == "relu" and "relu" not in can and "jumprelu" in can:
        activation, threshold = "jumprelu", torch.zeros(dictionary.n_features)
    if activation not in can:
        raise UnweaveError(
            f"{title} cannot express the activation {activation!r} of this {dictionary.name!r} dictionary; it has "
            + ", ".join(name for name in can if name not in ("skip", "standardise"))
        )
    if isinstance(dictionary, Standardised) and "standardise" not in can:
        raise UnweaveError(f"{title} cannot express this {dictionary.name!r} dictionary: it does not standardise rows")
    standardise = dictionary.config.standardise if isinstance(dictionary, Standardised) else None
    if isinstance(dictionary, Skip):
        if "skip" not in can:
            raise UnweaveError(f"{title} cannot express the skip of this {dictionary.name!r} dictionary")
        more["W_skip"] = dictionary.W_skip
    W_enc, W_dec, b_enc, b_dec = (
        _plain(t) for t in (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc, dictionary.b_dec)
    )
    more = {name: _plain(tensor) for name, tensor in more.items()}
    subtracts = dictionary.config.subtract_bias
    return Plain(W_enc, W_dec, b_enc, b_dec, subtracts, activation, k, threshold, standardise=standardise, **more)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
