"""overcomplete: its ``train_sae`` loop, stepped, with the criterion of its README; its matching pursuit encode.

The package imports its vision parts at once: models (torchvision, which has no CPU-only build) and plots (a function
matplotlib has removed). Empty modules stand in for these two of its own modules; nothing timed here touches them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .base import Endless, Peer, Setup, Stepped, silent, version

_VISION = ("overcomplete.models", "overcomplete.visualization")


class _Empty(ModuleType):
    """A module in which every name is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def overcomplete_sae() -> Any:
    """The module ``overcomplete.sae``."""
    if "overcomplete.sae" not in sys.modules:
        sys.modules.update({name: _Empty(name) for name in _VISION})
        with silent():
            importlib.import_module("overcomplete.sae")
    return sys.modules["overcomplete.sae"]


class Overcomplete(Peer):
    """TopK. Settings: "default" (README: Adam, squared error), "fastest": fused Adam and no monitoring, both of which
    its user hands in, "amp": its ``train_sae_amp``. It has no b_dec. With AuxK: its ``top_k_auxiliary_loss``, which
    takes half of all features that were not chosen, dead or not.
    """

    note = "no decoder bias"

    def __init__(self, setup: Setup, setting: str = "default") -> None:
        library = overcomplete_sae()
        losses = importlib.import_module("overcomplete.sae.losses")
        training = importlib.import_module("overcomplete.sae.train")
        self.name = f"overcomplete {version('overcomplete')} TopK"
        self.setting = {
            "default": "default",
            "fastest": "fastest: fused Adam, no monitoring",
            "amp": "train_sae_amp (bf16), fused Adam, no monitoring",
        }[setting]
        self.sae = library.TopKSAE(setup.d, nb_concepts=setup.n_features, top_k=setup.k, device="cpu")
        linear = self.sae.encoder.final_block[0]
        with torch.no_grad():
            linear.weight.copy_(setup.W_enc)
            linear.bias.copy_(setup.b_enc_without_centring)
            self.sae.dictionary._weights.copy_(setup.W_dec)
        fused = setting != "default"
        optimizer = torch.optim.Adam(self.sae.parameters(), lr=setup.lr, fused=fused or None)
        criterion = losses.top_k_auxiliary_loss if setup.auxk else _squared_error
        train = training.train_sae_amp if setting == "amp" else training.train_sae

        def loop(next_batch: Callable[[], Tensor]) -> None:
            data = Endless(next_batch)
            train(self.sae, data, criterion, optimizer, monitoring=0 if fused else 1, device="cpu")

        self.loop = Stepped(loop)

    def train_step(self, x: Tensor) -> None:
        self.sae.train()
        self.loop.step(x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        self.sae.eval()
        return self.sae.encode(x)[1]

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        self.sae.train()  # so that eval() takes the present weights; in eval mode it keeps the ones it took before
        self.sae.eval()
        return self.sae(x)[2]

    def force_dead(self, features: Tensor) -> None:
        """Nothing to tell: its auxiliary loss does not look at dead features."""

    def close(self) -> None:
        self.loop.close()


def _squared_error(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    """The criterion of its README."""
    return (x - x_hat).square().mean()


def matching_pursuit(atoms: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    """``MpSAE.encode`` in eval mode."""
    sae: Any = overcomplete_sae().MpSAE(atoms.shape[1], nb_concepts=len(atoms), k=k, device="cpu")
    with torch.no_grad():
        sae.dictionary._weights.copy_(atoms)
        sae.eval()

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        return sae.encode(x)[1]

    return encode
