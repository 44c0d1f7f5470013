"""dictionary_learning: its trainers' ``update``, which is all that its ``trainSAE`` loop calls in a step."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from .base import LONG_SILENT, Peer, Setup, silent, version


def dictionary_learning_trainers() -> Any:
    """The module ``dictionary_learning.trainers``, without what importing it does to the rest of the process.

    The nnsight release it needs replaces parts of torch, math and einops for everybody (autocast then fails in
    another library here); no trainer uses that.
    """
    if "nnsight" not in sys.modules:
        before = torch.autocast.__init__
        with silent():
            nnsight = importlib.import_module("nnsight")
        nnsight.DEFAULT_PATCHER.__exit__(None, None, None)
        torch.autocast.__init__ = before
    with silent():
        return importlib.import_module("dictionary_learning.trainers")


class DictionaryLearning(Peer):
    """TopK, BatchTopK or JumpReLU. Settings: "default", or "autocast": bf16, which its documentation calls a
    significant speedup. On CUDA its ``trainSAE`` wraps ``update`` in torch.autocast; on CPU it does not, so the
    wrapper is ours. Steps are numbered from 1001 on: the first step would overwrite b_dec, and its threshold
    statistics start after 1,000, as they would in nearly all of a real run.
    """

    def __init__(self, setup: Setup, arch: str = "TopK", setting: str = "default") -> None:
        trainers = dictionary_learning_trainers()
        self.name = f"dictionary_learning {version('dictionary-learning')} {arch}"
        self.setting = {"default": "default", "autocast": "fastest: bf16 autocast"}[setting]
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast")
        kind = {"TopK": "TopKTrainer", "BatchTopK": "BatchTopKTrainer", "JumpReLU": "JumpReluTrainer"}[arch]
        special = {"target_l0": float(setup.k), "sparsity_warmup_steps": None} if arch == "JumpReLU" else {"k": setup.k}
        self.trainer = getattr(trainers, kind)(
            steps=10**9,
            activation_dim=setup.d,
            dict_size=setup.n_features,
            layer=0,
            lm_name="synthetic",
            lr=setup.lr,
            warmup_steps=0,
            device="cpu",
            **special,
        )
        self.ae = self.trainer.ae
        with torch.no_grad():
            if arch == "JumpReLU":
                self.ae.W_enc.copy_(setup.W_enc.T)
                self.ae.W_dec.copy_(setup.W_dec)
                bias = setup.b_enc if self.ae.apply_b_dec_to_input else setup.b_enc_without_centring
                self.ae.b_enc.copy_(bias)
                self.ae.threshold.fill_(setup.threshold)
                self.ae.b_dec.copy_(setup.b_dec)
            else:
                self.ae.encoder.weight.copy_(setup.W_enc)
                self.ae.encoder.bias.copy_(setup.b_enc)
                self.ae.decoder.weight.copy_(setup.W_dec.T)
                self.ae.b_dec.copy_(setup.b_dec)
        self.step = 1001

    def train_step(self, x: Tensor) -> None:
        with self.autocast:
            self.trainer.update(self.step, x)
        self.step += 1

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.ae.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.ae.decode(self.ae.encode(x))

    def force_dead(self, features: Tensor) -> None:
        self.trainer.num_tokens_since_fired[features] = LONG_SILENT
