"""From a language model to a dictionary in training: harvest, shuffle and step, each library by its own means.

The model is a Llama of random weights in bfloat16 (the values do not matter for time), read after half of its 12
blocks over contexts of 128 random tokens; each library gets a copy. In the steady state one step costs each library
2,048 rows harvested, shuffled in and trained on; only eai-sparsify does not shuffle across contexts (it never does).
sae-lens shuffles in half-buffer bursts, so a timed call is as many steps as it serves between two of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Setup
from .harness import message, time_rounds

if TYPE_CHECKING:
    from .sections import Options, Results, Size

CONTEXT = 128
N_BLOCKS = 12
SITE_BLOCK = N_BLOCKS // 2 - 1


def run(size: Size, options: Options) -> Results:
    from .adapters import OUR_ENGINES
    from .sections import compare, meta, timed_row

    capacity = 8 * size.batch_size
    steps = capacity // 2 // size.batch_size
    model = _language_model(size.d)
    tokens = torch.randint(1, 1000, (64 * size.batch_size // CONTEXT, CONTEXT))
    with torch.no_grad():
        sample = _harvest(model, tokens[: 4096 // CONTEXT])
    setup = Setup.make(sample, size.n_features, size.k, size.batch_size, options.lr)
    builds: dict[str, Callable[[], Callable[[], Any]]] = {
        f"unweave/{engine}": (lambda engine=engine: _unweave(copy.deepcopy(model), tokens, setup, capacity, engine))
        for engine in OUR_ENGINES
    }
    builds["eai-sparsify/adam"] = lambda: _sparsify(copy.deepcopy(model), tokens, setup)
    builds["sae-lens/default"] = lambda: _sae_lens(copy.deepcopy(model), tokens, setup, capacity, "default")
    builds["sae-lens/autocast"] = lambda: _sae_lens(copy.deepcopy(model), tokens, setup, capacity, "autocast")
    calls, errors = {}, {}

    def several(step: Callable[[], Any]) -> Callable[[int], Any]:
        return lambda number: [step() for _ in range(steps)]

    for key, build in builds.items():
        if options.wanted(key):
            try:
                calls[key] = several(build())
            except Exception as error:
                errors[key] = message(error)
    calls["harvest alone"] = several(lambda: _harvest(model, tokens[: size.batch_size // CONTEXT]))
    measured = time_rounds(calls, rounds=options.rounds, warmups=options.warmups)
    rows = [
        timed_row(key, measured, errors, steps * size.batch_size, key.startswith("unweave"))
        for key in (*calls, *errors)
    ]
    compare(rows, measured, {key for key in calls if "/" in key and not key.startswith("unweave")})
    what = f"{size}, a {N_BLOCKS}-block model of width {size.d}, {steps} steps a call"
    return [{"size": what, "rows": rows, **meta(measured)}]


def _language_model(d: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=d,
        intermediate_size=8 * d // 3 // 64 * 64,
        num_hidden_layers=N_BLOCKS,
        num_attention_heads=d // 64,
        num_key_value_heads=max(1, d // 192),
        vocab_size=8192,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


class _Reached(Exception):
    pass


@torch.no_grad()
def _harvest(model: Any, tokens: Tensor) -> Tensor:
    """``(n_tokens, d)`` float32 rows of the site: the model stopped where they are made."""
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = model.model.layers[SITE_BLOCK].register_forward_hook(keep)
    try:
        model(input_ids=tokens, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return kept[0].flatten(0, 1).float()


def _unweave(model: Any, tokens: Tensor, setup: Setup, capacity: int, engine: str) -> Callable[[], Any]:
    from unweave.activations.ring import ShuffleRing
    from unweave.activations.stream import RowStream
    from unweave.sources.modules import ModuleSource

    from .ours import dictionary_of, trainer_of

    batches = tokens.split(setup.batch_size // CONTEXT)
    source = ModuleSource(model, [{"input_ids": part} for part in batches], f"model.layers.{SITE_BLOCK}")
    ring = ShuffleRing(RowStream(source), setup.batch_size, capacity)
    trainer = trainer_of(dictionary_of(setup, "TopK"), ring, setup, engine)
    trainer.advance()  # fills the ring
    return trainer.advance


class _Sequences(torch.utils.data.Dataset):
    """The contexts over and over."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index % len(self.tokens)]}


def _sparsify(model: Any, tokens: Tensor, setup: Setup) -> Callable[[], Any]:
    from .lib_sparsify import Sparsify

    site, sequences = f"layers.{SITE_BLOCK}", setup.batch_size // CONTEXT
    peer = Sparsify(setup, "adam", model, site, _Sequences(tokens), sequences)
    return lambda: peer.train_step(tokens)


def _sae_lens(model: Any, tokens: Tensor, setup: Setup, capacity: int, setting: str) -> Callable[[], Any]:
    from .lib_sae_lens import SaeLens, activation_store

    store = activation_store(model, f"model.layers.{SITE_BLOCK}", tokens, setup, capacity)
    peer = SaeLens(setup, "TopK", setting, store)
    peer.train_step(tokens)  # fills the buffer
    return lambda: peer.train_step(tokens)
