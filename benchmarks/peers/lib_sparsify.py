"""eai-sparsify: its ``Trainer.fit`` loop, stepped; the language model is replaced by one that hands rows through."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .base import LONG_SILENT, Peer, Setup, Stepped, matmul_precision, silent, version


class HandsThrough(nn.Module):
    """Stands where the trainer expects a language model: its one site gives the rows of the benchmark."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.site = nn.Identity()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self.rows: Callable[[], Tensor] = lambda: torch.zeros(1, d)  # the trainer looks up widths before it trains

    @property
    def base_model(self) -> HandsThrough:
        return self

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.rows()[None])


class Tokens(torch.utils.data.Dataset):
    """As many items of token ids as anyone asks for: the trainer counts them, and nothing reads their values."""

    def __init__(self, length: int) -> None:
        self.item = {"input_ids": torch.zeros(length, dtype=torch.long)}

    def __len__(self) -> int:
        return 10**9  # so that the learning rate's linear decay does not bite

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.item


class Sparsify(Peer):
    """TopK. Settings: "adam" (the same optimiser as the others), "signum" (its default), "groupmax" (its fast one).

    The documented speed setting that a CPU can use is the groupmax activation: the largest of each of k groups, which
    is not TopK. Autocast is on CUDA only in its code. There is no clipping. AuxK is off by default.

    With a language model, a site in it and a dataset of tokens, a step is harvest and all: ``sequences`` items of the
    dataset, and the rows given to ``train_step`` are not looked at.
    """

    def __init__(
        self,
        setup: Setup,
        setting: str = "adam",
        model: Any = None,
        site: str = "site",
        dataset: torch.utils.data.Dataset | None = None,
        sequences: int = 1,
    ) -> None:
        with silent():
            from sparsify import (
                SparseCoderConfig,
                TrainConfig,
                Trainer,
            )
        self.name = f"eai-sparsify {version('eai-sparsify')} TopK"
        optimizer = "signum" if setting == "signum" else "adam"
        self.setting = {
            "signum": "default (signum, its own lr)",
            "adam": "Adam",
            "groupmax": "fastest: Adam, groupmax activation (not TopK)",
        }[setting]
        activation: Any = "groupmax" if setting == "groupmax" else "topk"
        coder = SparseCoderConfig(activation=activation, num_latents=setup.n_features, k=setup.k)
        config = TrainConfig(
            coder,
            batch_size=sequences,
            optimizer=optimizer,
            lr=None if optimizer == "signum" else setup.lr,
            lr_warmup_steps=0,
            hookpoints=[site],
            auxk_alpha=1 / 32 if setup.auxk else 0.0,
            save_every=10**9,
            log_to_wandb=False,
            finetune="the tensors below",  # or the first step would set b_dec to the mean of its batch
        )
        hands: Any = HandsThrough(setup.d) if model is None else model
        items: Any = dataset or Tokens(setup.batch_size)
        with silent():
            self.trainer = Trainer(config, items, hands)
        self.site, self.sae = site, self.trainer.saes[site]
        with torch.no_grad():
            self.sae.encoder.weight.copy_(setup.W_enc)
            self.sae.encoder.bias.copy_(setup.b_enc)
            assert self.sae.W_dec is not None
            self.sae.W_dec.copy_(setup.W_dec)
            self.sae.b_dec.copy_(setup.b_dec)

        def loop(next_batch: Callable[[], Tensor]) -> None:
            hook = None
            if model is None:
                hands.rows = next_batch
            else:
                hook = hands.register_forward_pre_hook(lambda *_: _forget(next_batch()))
            try:
                self.trainer.fit()
            finally:
                if hook is not None:
                    hook.remove()

        with matmul_precision("highest"):
            self.loop = Stepped(loop)

    def train_step(self, x: Tensor) -> None:
        with matmul_precision("high"):  # what its fit sets for the whole process
            self.loop.step(x)

    def _evaluation(self) -> Any:
        return _Evaluated(self.trainer.optimizers[0])

    @torch.no_grad()
    def encode(self, x: Tensor) -> Any:
        return self.sae.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        with self._evaluation():
            code = self.sae.encode(x)
            return self.sae.decode(code.top_acts, code.top_indices)

    def dense(self, x: Tensor) -> Tensor:
        with self._evaluation():
            code = self.encode(x)
        return torch.zeros(len(x), self.sae.num_latents).scatter_(1, code.top_indices, code.top_acts)

    def force_dead(self, features: Tensor) -> None:
        self.trainer.num_tokens_since_fired[self.site][features] = LONG_SILENT

    def close(self) -> None:
        self.loop.close()


def _forget(rows: Tensor) -> None:
    """A forward hook's result would replace the model's input."""


class _Evaluated:
    """The averaged weights of a schedule-free optimiser while evaluating, as its documentation asks."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer if hasattr(optimizer, "eval") else None

    def __enter__(self) -> None:
        if self.optimizer is not None:
            self.optimizer.eval()

    def __exit__(self, *error: object) -> None:
        if self.optimizer is not None:
            self.optimizer.train()
