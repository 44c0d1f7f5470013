"""llamascopium (once lm-saes): its ``Trainer.fit`` loop, stepped."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import LONG_SILENT, Endless, Peer, Setup, Stepped, silent, version

_SITE = "site"


class Llamascopium(Peer):
    """TopK or BatchTopK. Settings: "default" (its trainer autocasts to bf16 unless told otherwise), "float32", and
    "fastest": default without its per-step metrics. Its Triton decode needs a GPU. AuxK is off by default. The
    dataset norm is given as sqrt(d), so that its normalisation multiplies by one.
    """

    note = "b_dec is not subtracted from the input"

    def __init__(self, setup: Setup, arch: str = "TopK", setting: str = "default") -> None:
        with silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from llamascopium.models.sae import (
                SAEConfig,
                SparseAutoEncoder,
            )
            from llamascopium.trainer import Trainer, TrainerConfig
        logging.disable(logging.INFO)
        self.name = f"llamascopium {version('llamascopium')} {arch}"
        self.setting = {
            "default": "default (bf16 autocast)",
            "float32": "float32",
            "fastest": "fastest: bf16 autocast, no metrics",
        }[setting]
        config = SAEConfig(
            hook_point_in=_SITE,
            hook_point_out=_SITE,
            d_model=setup.d,
            expansion_factor=setup.n_features / setup.d,
            act_fn=arch.lower(),  # pyright: ignore[reportArgumentType]
            top_k=setup.k,
        )
        self.sae = SparseAutoEncoder(config)
        self.sae.set_dataset_average_activation_norm({_SITE: math.sqrt(setup.d)})
        with torch.no_grad():
            self.sae.W_E.copy_(setup.W_enc.T)
            self.sae.b_E.copy_(setup.b_enc_without_centring)
            self.sae.W_D.copy_(setup.W_dec)
            self.sae.b_D.copy_(setup.b_dec)
        self._folder = tempfile.TemporaryDirectory()
        training = TrainerConfig(
            lr=setup.lr,
            lr_scheduler_name="constant",
            k_warmup_steps=0,
            initial_k=setup.k,
            auxk_coefficient=1 / 32 if setup.auxk else None,
            amp_dtype=torch.float32 if setting == "float32" else torch.bfloat16,
            skip_metrics_calculation=setting == "fastest",
            total_training_tokens=10**12,
            n_checkpoints=0,
            exp_result_path=self._folder.name,
        )
        self.trainer = Trainer(training)
        ones = torch.ones(setup.batch_size, dtype=torch.bool)
        tokens = torch.zeros(setup.batch_size, dtype=torch.long)
        first: Any = {"tokens": tokens, "mask": ones, _SITE: torch.zeros(setup.batch_size, setup.d)}

        def loop(next_batch: Callable[[], Tensor]) -> None:
            def item() -> dict[str, Tensor]:
                nonlocal first
                if first is not None:  # it looks at one batch before it trains
                    looked_at, first = first, None
                    return looked_at
                return {"tokens": tokens, "mask": ones, _SITE: next_batch()}

            self.trainer.fit(self.sae, Endless(item))

        self.loop = Stepped(loop)

    def train_step(self, x: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.loop.step(x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x))

    def force_dead(self, features: Tensor) -> None:
        assert self.trainer.tokens_since_last_activation is not None
        self.trainer.tokens_since_last_activation[features] = LONG_SILENT

    def close(self) -> None:
        self.loop.close()
        self._folder.cleanup()
