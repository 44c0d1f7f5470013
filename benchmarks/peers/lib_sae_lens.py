"""sae-lens: its ``SAETrainer.fit`` loop, stepped; its inference SAE, pursuit SAE and mixing buffer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .base import LONG_SILENT, Endless, Peer, Setup, Stepped, silent, version


class SaeLens(Peer):
    """TopK, BatchTopK or JumpReLU.

    Settings: "default", "autocast" (bf16, its config flag) and "sparse" (its ``use_sparse_activations`` flag). Decoder
    norms are not held at one: it multiplies by them instead (``rescale_acts_by_decoder_norm``, its default).

    With a ``source`` (an iterator of batches, as its activation store is), the trainer takes its rows from there, and
    those given to ``train_step`` are not looked at.
    """

    def __init__(
        self, setup: Setup, arch: str = "TopK", setting: str = "default", source: Iterator[Tensor] | None = None
    ) -> None:
        with silent():
            from sae_lens import (
                BatchTopKTrainingSAE,
                BatchTopKTrainingSAEConfig,
                JumpReLUTrainingSAE,
                JumpReLUTrainingSAEConfig,
                TopKTrainingSAE,
                TopKTrainingSAEConfig,
            )
            from sae_lens.config import SAETrainerConfig
            from sae_lens.training.sae_trainer import SAETrainer
        self.name = f"sae-lens {version('sae-lens')} {arch}"
        self.setting = {
            "default": "default",
            "autocast": "fastest: bf16 autocast",
            "sparse": "sparse activations",
        }[setting]
        sizes: dict[str, Any] = {"d_in": setup.d, "d_sae": setup.n_features, "decoder_init_norm": None}
        if arch == "JumpReLU":
            mode: dict[str, Any] = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(setup.k)}
            self.sae: Any = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**sizes, **mode))
            self.sae.threshold.data.fill_(setup.threshold)
        else:
            config_kind: Any = TopKTrainingSAEConfig if arch == "TopK" else BatchTopKTrainingSAEConfig
            kind: Any = TopKTrainingSAE if arch == "TopK" else BatchTopKTrainingSAE
            self.sae = kind(config_kind(**sizes, k=setup.k, use_sparse_activations=setting == "sparse"))
        with torch.no_grad():
            self.sae.W_enc.copy_(setup.W_enc.T)
            self.sae.b_enc.copy_(setup.b_enc if self.sae.cfg.apply_b_dec_to_input else setup.b_enc_without_centring)
            self.sae.W_dec.copy_(setup.W_dec)
            self.sae.b_dec.copy_(setup.b_dec)
        config = SAETrainerConfig(
            total_training_samples=10**12,
            train_batch_size_samples=setup.batch_size,
            lr=setup.lr,
            lr_end=setup.lr,
            device="cpu",
            autocast=setting == "autocast",
        )

        def loop(next_batch: Callable[[], Tensor]) -> None:
            def item() -> Tensor:
                rows = next_batch()
                return rows if source is None else next(source)

            self.trainer = SAETrainer(config, self.sae, Endless(item))
            self.trainer.fit()

        self.trainer: Any = None  # made when the loop starts, on the next line
        self.loop = Stepped(loop)
        self._inference: Any = None

    def train_step(self, x: Tensor) -> None:
        self._inference = None
        self.loop.step(x)

    @property
    def inference(self) -> Any:
        """The SAE as its users load it: saved in inference form, then read back."""
        if self._inference is None:
            from sae_lens import SAE

            with tempfile.TemporaryDirectory() as folder, silent():
                self.sae.save_inference_model(folder)
                self._inference = SAE.load_from_disk(folder).eval()
        return self._inference

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.inference.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.inference.decode(self.inference.encode(x))

    def force_dead(self, features: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired[features] = LONG_SILENT

    def close(self) -> None:
        self.loop.close()


def activation_store(model: Any, site: str, tokens: Tensor, setup: Setup, capacity: int) -> Iterator[Tensor]:
    """Its activation store over a Hugging Face model and ``(n, context)`` tokens, shuffling ``capacity`` rows."""
    from datasets import Dataset

    with silent():
        from sae_lens.load_model import HookedProxyLM
        from sae_lens.training.activations_store import ActivationsStore
    context = tokens.shape[1]
    tokenizer: Any = None  # the data is tokens already
    return ActivationsStore(
        model=HookedProxyLM(model, tokenizer, hook_names=[site]),
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch"),
        streaming=False,
        hook_name=site,
        hook_head_index=None,
        context_size=context,
        d_in=setup.d,
        n_batches_in_buffer=capacity // context,
        total_training_tokens=10**12,
        store_batch_size_prompts=setup.batch_size // context,
        train_batch_size_tokens=setup.batch_size,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        sequence_separator_token=None,
    )


def matching_pursuit(atoms: Tensor, k: int, setting: str = "default") -> Callable[[Tensor], Tensor]:
    """Its matching pursuit encode, k iterations; "no duplicate check" is its faster setting."""
    with silent():
        from sae_lens import (
            MatchingPursuitSAE,
            MatchingPursuitSAEConfig,
        )
    check = setting == "default"
    threshold = 1e-2 if check else 0.0
    config = MatchingPursuitSAEConfig(
        d_in=atoms.shape[1],
        d_sae=len(atoms),
        max_iterations=k,
        stop_on_duplicate_support=check,
        residual_threshold=threshold,
        apply_b_dec_to_input=False,
    )
    sae: Any = MatchingPursuitSAE(config)
    sae.W_dec.data.copy_(atoms)
    return torch.no_grad()(sae.encode)


def mixing_buffer(rows: Tensor, capacity: int, batch_size: int, chunk: int) -> Iterator[Tensor]:
    """Its shuffle buffer over an endless producer that gives ``chunk`` rows at a time, its mix fraction."""
    with silent():
        from sae_lens.training.mixing_buffer import mixing_buffer as buffer

    def produce() -> Iterator[Tensor]:
        while True:
            yield from rows.split(chunk)

    return buffer(capacity, batch_size, produce())
