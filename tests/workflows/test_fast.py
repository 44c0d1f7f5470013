"""Test (f) of FAST: dictionaries of whole dialogues reconstruct the template's tokens better than those of blocks."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import unweave
from unweave.evaluation import evaluate
from unweave.sources import Documents, LanguageModel, TextSource
from unweave.sources.chats import to_chat

BLOCK, SITE, N_ROWS = 64, "layers.1", 16_000


def taught(folder, texts: list[str], dialogues: list[str], seed: int) -> LanguageModel:
    """The tiny chat model, first taught plain text in blocks, then dialogues, each alone."""
    model = LanguageModel.load(str(folder), dtype="float32", device="cpu")
    network = model.model.requires_grad_(True)
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    generator = torch.Generator().manual_seed(seed)
    plain = blocks(model.tokenize_many(texts))
    chats = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids[:96]) for ids in model.tokenize_chats(dialogues)], batch_first=True, padding_value=-100
    )
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for data in (plain, chats):
        for _ in range(150):
            labels = data[torch.randint(len(data), (24,), generator=generator)]
            real = labels >= 0
            loss = network(labels.clamp_min(0), attention_mask=real.long(), labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    network.requires_grad_(False)
    return model


def blocks(token_lists: list[list[int]]) -> Tensor:
    """Everything behind each other, cut into blocks without regard to where a text ends: ``(b, BLOCK)``."""
    joined = torch.tensor([token for ids in token_lists for token in ids])
    return joined[: len(joined) // BLOCK * BLOCK].view(-1, BLOCK)


def special_mse(rows: Tensor, held_out: TextSource, seed: int) -> float:
    assert len(rows) >= N_ROWS
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    dictionary = unweave.fit(
        rows[order[:N_ROWS]], n_features=128, k=4, seed=seed, epochs=12, batch_size=256, device="cpu"
    )
    return evaluate(dictionary, held_out, n_rows=3000, n_loss_tokens=0, baselines=False, n_bootstrap=0, progress=False)[
        "special_mse"
    ]


def three(folder, documents: list[str], seed: int) -> tuple[float, float, float]:
    """special_mse of FAST, of blocks of the same dialogues, of blocks of plain text; equal numbers of rows."""
    rng = random.Random(seed)
    dialogues = []
    for _ in range(700):
        turns = [rng.choice(documents)[:40] for _ in range(2 * rng.randint(1, 3))]
        dialogues.append([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)])
    texts = [rng.choice(documents) for _ in range(1500)]
    chats = [to_chat(dialogue, "") for dialogue in dialogues]
    model = taught(folder, texts, chats, seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fast = TextSource(model, Documents.from_chats(dialogues), SITE, split="train", min_tokens=1)
        held_out = TextSource(model, Documents.from_chats(dialogues), SITE, split="held_out", min_tokens=1)
        trained_on = [
            torch.cat([batch.input for batch in fast.batches()]),
            *(
                model.run_to(SITE, data[:400])[SITE].flatten(0, 1)
                for data in (blocks(model.tokenize_chats(chats)), blocks(model.tokenize_many(texts)))
            ),
        ]
        found = [special_mse(rows, held_out, seed) for rows in trained_on]
        return found[0], found[1], found[2]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_f_fast_before_blocks_of_dialogues_before_blocks_of_text(chat_model, documents):
    """special_mse, in thousandths, of FAST / blocks of dialogues / blocks of text:

    seed 0: 2.09 / 3.41 / 297; 1: 1.79 / 2.16 / 893; 2: 1.62 / 4.31 / 573; 3: 2.13 / 2.81 / 228; 4: 2.50 / 4.34 / 194.
    """
    fast, packed, plain = three(chat_model, documents, seed=0)
    assert fast < packed < plain
